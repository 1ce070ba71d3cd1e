# `nginx -V` says how it was configured: without the folder that it was built in, so that any folder gives the same bytes.
define LG_NGINX_NO_FOLDER
	$(SED) 's,$(HOST_DIR)/bin/,,g' $(@D)/objs/ngx_auto_config.h
endef
NGINX_POST_CONFIGURE_HOOKS += LG_NGINX_NO_FOLDER
