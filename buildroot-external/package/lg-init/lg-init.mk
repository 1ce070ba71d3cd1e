################################################################################
#
# lg-init
#
################################################################################

LG_INIT_SITE = $(LG_INIT_PKGDIR)/src
LG_INIT_SITE_METHOD = local
LG_INIT_LICENSE = MIT

define LG_INIT_BUILD_CMDS
	cd $(@D) && $(TARGET_CC) $(TARGET_CFLAGS) -ffile-prefix-map=$(@D)=. -Wall -Wextra -Werror \
		$(TARGET_LDFLAGS) -static -s -o lg-init main.c machine.c net.c process.c
endef

define LG_INIT_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/lg-init $(TARGET_DIR)/bin/lg-init
endef

$(eval $(generic-package))
