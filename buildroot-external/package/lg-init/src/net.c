/* The network, by ioctl: a tenth of what a shell with ifconfig, arp and route costs. */
#include "lg-init.h"

#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <net/route.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

static int control = -1;

static int open_control(void) {
    if (control < 0) control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    return control < 0;
}

static void name_device(struct ifreq *request, const char *device) {
    memset(request, 0, sizeof *request);
    strncpy(request->ifr_name, device, IFNAMSIZ - 1);
}

int mac_of(const char *device, unsigned char mac[6]) {
    struct ifreq request;
    name_device(&request, device);
    if (open_control() || ioctl(control, SIOCGIFHWADDR, &request)) return -1;
    memcpy(mac, request.ifr_hwaddr.sa_data, 6);
    return 0;
}

static void set_ip(struct sockaddr *address, uint32_t ip) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(ip)};
    memcpy(address, &in, sizeof in);
}

static int set_up(const char *device, int up) {
    struct ifreq request;
    name_device(&request, device);
    if (ioctl(control, SIOCGIFFLAGS, &request)) return -1;
    short flags = request.ifr_flags;
    request.ifr_flags = (short)(up ? flags | IFF_UP : flags & ~IFF_UP);
    return request.ifr_flags == flags ? 0 : ioctl(control, SIOCSIFFLAGS, &request);
}

static int set_mac(const char *device, const unsigned char mac[6]) {
    unsigned char now[6];
    if (!mac_of(device, now) && !memcmp(now, mac, 6)) return 0;
    struct ifreq request;
    name_device(&request, device);
    request.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    memcpy(request.ifr_hwaddr.sa_data, mac, 6);
    return set_up(device, 0) || ioctl(control, SIOCSIFHWADDR, &request);
}

static int set_address(const char *device, unsigned long what, uint32_t ip) {
    struct ifreq request;
    name_device(&request, device);
    set_ip(&request.ifr_addr, ip);
    return ioctl(control, (int)what, &request);
}

static int set_neighbour(const char *device, uint32_t ip, const unsigned char mac[6]) {
    struct arpreq request;
    memset(&request, 0, sizeof request);
    set_ip(&request.arp_pa, ip);
    request.arp_ha.sa_family = ARPHRD_ETHER;
    memcpy(request.arp_ha.sa_data, mac, 6);
    request.arp_flags = ATF_PERM | ATF_COM;
    strncpy(request.arp_dev, device, sizeof request.arp_dev - 1);
    return ioctl(control, SIOCSARP, &request);
}

static int set_route(uint32_t gateway) {
    struct rtentry route;
    memset(&route, 0, sizeof route);
    set_ip(&route.rt_dst, 0);
    set_ip(&route.rt_genmask, 0);
    set_ip(&route.rt_gateway, gateway);
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    while (!ioctl(control, SIOCDELRT, &route)) {
    } /* from an earlier `net` */
    return ioctl(control, SIOCADDRT, &route);
}

/* The text after "key=", or null. */
static const char *value_of(const char *word, const char *key) {
    size_t length = strlen(key);
    return strncmp(word, key, length) || word[length] != '=' ? 0 : word + length + 1;
}

int do_net(int count, char **word) {
    (void)count;
    const char *device = word[1];
    uint32_t network, host;
    uint64_t bits, first;
    unsigned char host_mac[6], mac[6] = {0x02, 'L', 'G'};

    char *slash = strchr(word[2], '/');
    if (!slash) return failed("not of the form ADDRESS/BITS", word[2]);
    *slash = 0;
    if (get_ip(word[2], &network) || get_number(slash + 1, &bits) || bits < 1 || bits > 30)
        return failed("not a network", word[2]);
    const char *text = value_of(word[3], "first");
    if (!text || get_number(text, &first)) return failed("not first=NUMBER", word[3]);
    text = value_of(word[4], "host");
    if (!text || get_ip(text, &host)) return failed("not host=ADDRESS", word[4]);
    text = value_of(word[5], "hostmac");
    if (!text || get_mac(text, host_mac)) return failed("not hostmac=MAC", word[5]);

    uint32_t mask = ~0u << (32 - bits);
    uint64_t index = first + vm_number;
    network &= mask;
    if (index < 1 || index >= ~mask) return failed("the network has no address for this VM", word[2]);
    uint32_t ip = network + (uint32_t)index;

    mac[3] = (unsigned char)(vm_number >> 16);
    mac[4] = (unsigned char)(vm_number >> 8);
    mac[5] = (unsigned char)vm_number;

    if (NOT_THE_GUEST()) return -1;
    if (open_control()) return failed_errno("cannot open a socket", 0);
    if (set_up("lo", 1)) failed_errno("cannot start", "lo");
    if (set_mac(device, mac)) return failed_errno("cannot set the MAC of", device);
    if (set_address(device, SIOCSIFADDR, ip)) return failed_errno("cannot set the address of", device);
    if (set_address(device, SIOCSIFNETMASK, mask)) return failed_errno("cannot set the netmask of", device);
    if (set_up(device, 1)) return failed_errno("cannot start", device);

    char *p = vm_address;
    const char *end = vm_address + sizeof vm_address;
    for (int shift = 24; shift >= 0; shift -= 8) {
        p = put_number(p, end, ip >> shift & 255);
        if (shift) p = put_text(p, end, ".");
    }
    if (set_neighbour(device, host, host_mac))
        return failed_errno("cannot set the ARP entry of the host side", 0);
    if (set_route(host)) return failed_errno("cannot set the default route", 0);
    return 0;
}
