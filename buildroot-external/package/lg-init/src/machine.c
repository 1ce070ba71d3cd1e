/* What init reads from the machine itself: its number, the date, randomness. */
#include "lg-init.h"

#include <fcntl.h>
#include <linux/random.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* Touching a register that this machine does not have raises a signal: try, and say whether it was there. */
static sigjmp_buf missing;

static void on_missing(int signal_number) {
    (void)signal_number;
    siglongjmp(missing, 1);
}

static void catch_missing(int on) {
    static const int numbers[] = {SIGILL, SIGBUS, SIGSEGV};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on ? on_missing : SIG_DFL;
    for (unsigned i = 0; i < 3; i++) sigaction(numbers[i], &action, 0);
}

/* Maps the page of a physical address; returns the address in this process, or null. */
static volatile void *map_physical(uint64_t address) {
    int fd = open("/dev/mem", O_RDONLY | O_SYNC | O_CLOEXEC);
    if (fd < 0) return 0;
    void *page = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, (off_t)(address & ~4095ull));
    close(fd);
    return page == MAP_FAILED ? 0 : (char *)page + (address & 4095);
}

static void unmap_physical(volatile void *at) { munmap((void *)((uintptr_t)at & ~(uintptr_t)4095), 4096); }

/* The config space is read byte by byte, as the virtio driver does. */
static int read_bytes(uint64_t address, unsigned char *bytes, int count) {
    volatile unsigned char *at = map_physical(address);
    if (!at) return -1;
    int result = -1;
    catch_missing(1);
    if (!sigsetjmp(missing, 1)) {
        for (int i = 0; i < count; i++) bytes[i] = at[i];
        result = 0;
    }
    catch_missing(0);
    unmap_physical(at);
    return result;
}

int do_identity(int count, char **word) {
    (void)count;
    uint64_t address;
    unsigned char mac[6];
    if (get_number(word[1], &address)) return failed("not an address", word[1]);
    if (NOT_THE_GUEST()) return -1;
    static const unsigned char prefix[3] = {0x02, 'L', 'G'};
    if ((address & 4095) > 4096 - sizeof mac || read_bytes(address, mac, sizeof mac) ||
        memcmp(mac, prefix, sizeof prefix)) {
        vm_number = 0;
        if (mac_of("eth0", mac) || memcmp(mac, prefix, sizeof prefix)) return 0;
    }
    vm_number = (uint32_t)mac[3] << 16 | (uint32_t)mac[4] << 8 | mac[5];
    return 0;
}

int do_clock(int count, char **word) {
    uint64_t address, fallback = 1767225600, now = 0;
    if (get_number(word[1], &address) || address & 3) return failed("not the address of a clock", word[1]);
    if (count > 2 && get_number(word[2], &fallback)) return failed("not a number of seconds", word[2]);
    if (NOT_THE_GUEST()) return -1;

    volatile uint32_t *at = map_physical(address);
    if (at) {
        catch_missing(1);
        if (!sigsetjmp(missing, 1)) {
            uint64_t low = at[0]; /* reading the low half latches the high one */
            now = low | (uint64_t)at[1] << 32;
        }
        catch_missing(0);
        unmap_physical(at);
    }
    uint64_t seconds = now / 1000000000u;
    struct timespec date = {.tv_sec = (time_t)seconds, .tv_nsec = (long)(now - seconds * 1000000000u)};
    if (!now) {
        struct timespec is;
        clock_gettime(CLOCK_REALTIME, &is);
        if (is.tv_sec >= (time_t)fallback) return 0;
        date.tv_sec = (time_t)fallback;
    }
    if (clock_settime(CLOCK_REALTIME, &date)) return failed_errno("cannot set the date", 0);
    return 0;
}

/* 16 bits from the seed register (Zkr, CSR 0x015); -1 where it has died or stays silent. */
static int seed16(void) {
#ifdef __riscv /* tests are built for other machines */
    for (int tries = 0; tries < 1000; tries++) {
        uint32_t seed;
        __asm__ volatile("csrrw %0, 0x015, x0" : "=r"(seed));
        unsigned state = seed >> 30;
        if (state == 2) return (int)(seed & 0xffff);
        if (state == 3) return -1;
    }
#endif
    return -1;
}

int do_entropy(int count, char **word) {
    (void)count;
    (void)word;
    struct {
        int bits, size;
        uint16_t data[16];
    } pool = {.bits = 256, .size = 32};
    static volatile int got;
    if (NOT_THE_GUEST()) return -1;
    got = 0;
    catch_missing(1);
    if (!sigsetjmp(missing, 1)) {
        for (; got < 16; got++) {
            int seed = seed16();
            if (seed < 0) break;
            ((volatile uint16_t *)pool.data)[got] = (uint16_t)seed;
        }
    }
    catch_missing(0);
    if (got < 16) return 0; /* no such register here */

    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    if (fd < 0) return failed_errno("cannot open", "/dev/urandom");
    int result = ioctl(fd, RNDADDENTROPY, &pool);
    if (result) failed_errno("cannot add entropy", 0);
    /* A clone must not go on with its template's stream; before the pool is ready there is none to renew. */
    ioctl(fd, RNDRESEEDCRNG);
    close(fd);
    return result;
}
