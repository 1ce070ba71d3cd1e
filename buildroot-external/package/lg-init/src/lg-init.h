/* lg-init: interprets the generated /init. See ../README.md for the directives. */
#ifndef LG_INIT_H
#define LG_INIT_H

#include <stdint.h>

enum {
    MAX_WORDS = 32,  /* one of them stays free for the terminating null pointer */
    MAX_LINE = 1024, /* also the longest line after %n and %a are replaced */
    MAX_FILE = 16384,
};

/* What the words %n and %a stand for. */
extern uint32_t vm_number;
extern char vm_address[16];

/* Text, without stdio: it would double the program. */
void say(const char *text);
char *put_text(char *to, const char *end, const char *text);
char *put_number(char *to, const char *end, uint32_t value);
/* The whole text is one number, decimal or 0x...; 0 on success. */
int get_number(const char *text, uint64_t *value);
int get_ip(const char *text, uint32_t *host_order);
int get_mac(const char *text, unsigned char mac[6]);

/* Directives return 0, or -1 after `failed` or `failed_errno` has told why. */
int failed(const char *what, const char *detail);
int failed_errno(const char *what, const char *detail);

/* Built for any other machine, for its tests, the program must not touch what belongs to that machine: its
 * network, its date, its name, its memory. */
#if defined(__riscv) && __riscv_xlen == 32
#define NOT_THE_GUEST() 0
#else
#define NOT_THE_GUEST() failed("this is not the guest", 0)
#endif

/* machine.c */
int do_entropy(int count, char **word);
int do_identity(int count, char **word);
int do_clock(int count, char **word);

/* net.c */
int do_net(int count, char **word);
/* The MAC of an interface; 0 on success. */
int mac_of(const char *device, unsigned char mac[6]);

/* process.c */
int do_console(int count, char **word);
int do_run(int count, char **word);
int do_start(int count, char **word);
int do_wait(int count, char **word);
int do_ready(int count, char **word);
int do_shell(int count, char **word);
void reap_for_ever(void);

#endif
