# Programs of the building machine in place of host packages, for networks that reach only a distribution's archive.
# Included by the generated file that BR2_PACKAGE_OVERRIDE_FILE names, before any package: `override` keeps what is
# said here.

# $(1): the package in capitals, without HOST_; $(2): PROGRAM or PROGRAM:NAME, where NAME is what Buildroot looks for.
define lg-machine-programs
HOST_$(1)_OVERRIDE_SRCDIR = $$(LG_EMPTY)
override HOST_$(1)_DEPENDENCIES =
override HOST_$(1)_AUTORECONF = NO
override HOST_$(1)_POST_PATCH_HOOKS =
override HOST_$(1)_PRE_CONFIGURE_HOOKS =
override HOST_$(1)_POST_CONFIGURE_HOOKS =
override HOST_$(1)_POST_BUILD_HOOKS =
override HOST_$(1)_CONFIGURE_CMDS =
override HOST_$(1)_BUILD_CMDS =
override HOST_$(1)_INSTALL_CMDS = mkdir -p $$(HOST_DIR)/bin $(foreach program,$(2),&& \
	ln -sf $(word 1,$(subst :, ,$(program))) $$(HOST_DIR)/bin/$(notdir $(lastword $(subst :, ,$(program)))))
endef
