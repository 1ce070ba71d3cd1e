LG_CHECK_CONFIG = sh $(BR2_EXTERNAL_LG_PATH)/support/check-config.sh

# Programs only: with functions in sections of their own, half of the kernel's text would lie outside of what its linker
# script calls text.
TARGET_CFLAGS += -ffunction-sections -fdata-sections -msave-restore

# Kernel and busybox are configured from fragments alone: what they do not name is off. Buildroot would fill in
# defaults. The hooks are lg-init's, which every image has.
LG_LINUX_FRAGMENTS = $(LINUX_KCONFIG_FILE) $(LINUX_KCONFIG_FRAGMENT_FILES)
define LG_INIT_LINUX_CONFIG_FIXUPS
	cat $(LG_LINUX_FRAGMENTS) > $(LINUX_DIR)/.lg.config
	$(LINUX_MAKE_ENV) KCONFIG_ALLCONFIG=$(LINUX_DIR)/.lg.config $(LINUX_MAKE) -C $(LINUX_DIR) \
		$(PKG_KCONFIG_COMMON_OPTS) $(LINUX_KCONFIG_OPTS) allnoconfig
endef

define LG_LINUX_CHECK_CONFIG
	$(LG_CHECK_CONFIG) linux $(LINUX_DIR)/.config $(LG_LINUX_FRAGMENTS)
endef
LINUX_POST_CONFIGURE_HOOKS += LG_LINUX_CHECK_CONFIG

# blake2s' self-test costs each boot about six million instructions. It runs unless tests are off in a part of the
# configuration (CRYPTO) that is off as a whole here, so no fragment can say it.
LINUX_CFLAGS += -DCONFIG_CRYPTO_MANAGER_DISABLE_TESTS=1

# Which of the kernel's objects are compiled for speed.
LINUX_MAKE_ENV += MAKEFILES=$(BR2_EXTERNAL_LG_PATH)/kernel/fast.mk

# Parts that no configuration of ours reads; their Kconfig files stay. Halves the unpacking.
LINUX_EXCLUDES = */Documentation/*/* */drivers/gpu/drm/*.[ch] */drivers/infiniband/*.[ch] */drivers/media/*.[ch] \
	*/drivers/net/ethernet/*.[ch] */drivers/net/wireless/*.[ch] */drivers/scsi/*.[ch] */drivers/staging/*.[ch] \
	*/sound/*.[ch] */tools/perf/* */tools/testing/*

LG_BUSYBOX_FRAGMENTS = $(BUSYBOX_KCONFIG_FILE) $(BUSYBOX_KCONFIG_FRAGMENT_FILES)
# Its Kconfig knows no KCONFIG_ALLCONFIG: lay the fragments over the smallest configuration, and decline what becomes
# visible by that.
define LG_INIT_BUSYBOX_CONFIG_FIXUPS
	$(BUSYBOX_MAKE_ENV) $(MAKE) $(BUSYBOX_MAKE_OPTS) -C $(BUSYBOX_DIR) $(PKG_KCONFIG_COMMON_OPTS) allnoconfig
	support/kconfig/merge_config.sh -m -O $(BUSYBOX_DIR) $(BUSYBOX_DIR)/.config $(LG_BUSYBOX_FRAGMENTS)
	i=0; while [ $$i -lt 3000 ]; do echo n; i=$$((i + 1)); done | \
		$(BUSYBOX_MAKE_ENV) $(MAKE) $(BUSYBOX_MAKE_OPTS) -C $(BUSYBOX_DIR) $(PKG_KCONFIG_COMMON_OPTS) oldconfig
endef

define LG_BUSYBOX_CHECK_CONFIG
	$(LG_CHECK_CONFIG) busybox $(BUSYBOX_DIR)/.config $(LG_BUSYBOX_FRAGMENTS)
endef
BUSYBOX_POST_CONFIGURE_HOOKS += LG_BUSYBOX_CHECK_CONFIG

# After the fixups: a package's are looked for where its file is read.
include $(sort $(wildcard $(BR2_EXTERNAL_LG_PATH)/package/*/*.mk))
