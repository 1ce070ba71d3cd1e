# Neither has the kernel.
IPTABLES_CONF_OPTS += --disable-ipv6
