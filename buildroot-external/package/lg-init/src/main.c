#include "lg-init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

uint32_t vm_number;
char vm_address[16] = "0.0.0.0";

static const char *file_name;
static unsigned line_number;

char *put_text(char *to, const char *end, const char *text) {
    while (*text && to + 1 < end) *to++ = *text++;
    *to = 0;
    return to;
}

char *put_number(char *to, const char *end, uint32_t value) {
    char digits[11];
    char *p = digits + sizeof digits;
    *--p = 0;
    do *--p = (char)('0' + value % 10);
    while (value /= 10);
    return put_text(to, end, p);
}

void say(const char *text) {
    if (write(2, text, strlen(text)) < 0) return; /* nowhere to say so */
}

int failed(const char *what, const char *detail) {
    char text[MAX_LINE];
    const char *end = text + sizeof text - 1;
    char *p = put_text(text, end, "lg-init: ");
    p = put_text(p, end, file_name);
    p = put_text(p, end, ":");
    p = put_number(p, end, line_number);
    p = put_text(p, end, ": ");
    p = put_text(p, end, what);
    if (detail) {
        p = put_text(p, end, ": ");
        p = put_text(p, end, detail);
    }
    p[0] = '\n';
    p[1] = 0;
    say(text);
    return -1;
}

int failed_errno(const char *what, const char *detail) {
    int error = errno;
    char text[256];
    const char *end = text + sizeof text;
    char *p = put_text(text, end, what);
    if (detail) {
        p = put_text(p, end, " ");
        put_text(p, end, detail);
    }
    return failed(text, strerror(error));
}

int get_number(const char *text, uint64_t *value) {
    unsigned base = 10;
    uint64_t v = 0;
    if (text[0] == '0' && text[1] == 'x') {
        base = 16;
        text += 2;
    }
    size_t length = strlen(text);
    if (length < 1 || length > (base == 10 ? 19 : 16)) return -1; /* more could overflow */
    for (; *text; text++) {
        unsigned c = (unsigned char)*text, digit = c - '0';
        if (digit > 9) digit = (c | 32) >= 'a' ? (c | 32) - 'a' + 10 : 16;
        if (digit >= base) return -1;
        v = v * base + digit;
    }
    *value = v;
    return 0;
}

/* Groups of digits with a separator, as in IPv4 and MAC addresses. */
static int get_groups(const char *text, char separator, unsigned base, unsigned char *group, int count) {
    for (int i = 0; i < count; i++) {
        unsigned v = 0, digits = 0;
        for (;; text++, digits++) {
            unsigned c = (unsigned char)*text, digit = c - '0';
            if (digit > 9) digit = (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
            if (digit >= base) break;
            v = v * base + digit;
            if (v > 255) return -1;
        }
        if (!digits || *text != (i + 1 < count ? separator : 0)) return -1;
        group[i] = (unsigned char)v;
        text++;
    }
    return 0;
}

int get_ip(const char *text, uint32_t *host_order) {
    unsigned char b[4];
    if (get_groups(text, '.', 10, b, 4)) return -1;
    *host_order = (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
    return 0;
}

int get_mac(const char *text, unsigned char mac[6]) { return get_groups(text, ':', 16, mac, 6); }

static int make_folders(const char *path) {
    char part[MAX_LINE];
    size_t length = strlen(path);
    memcpy(part, path, length + 1); /* a word is shorter than a line */
    for (size_t i = 1; i < length; i++) {
        if (part[i] != '/') continue;
        part[i] = 0;
        mkdir(part, 0755);
        part[i] = '/';
    }
    struct stat is;
    if (mkdir(part, 0755) && (errno != EEXIST || stat(part, &is) || !S_ISDIR(is.st_mode)))
        return failed_errno("cannot make the folder", path);
    return 0;
}

static int do_mkdir(int count, char **word) {
    int result = 0;
    for (int i = 1; i < count; i++) result |= make_folders(word[i]);
    return result;
}

static int do_mount(int count, char **word) {
    if (NOT_THE_GUEST()) return -1;
    if (make_folders(word[2])) return -1;
    if (mount(word[1], word[2], word[3], 0, count > 4 ? word[4] : 0)) {
        if (errno == EBUSY) return 0; /* mounted already */
        return failed_errno("cannot mount", word[2]);
    }
    return 0;
}

static int do_link(int count, char **word) {
    (void)count;
    if (unlink(word[2]) && errno != ENOENT) return failed_errno("cannot replace", word[2]);
    if (symlink(word[1], word[2])) return failed_errno("cannot make the link", word[2]);
    return 0;
}

static int do_write(int count, char **word) {
    char text[MAX_LINE + 1], fresh[MAX_LINE];
    const char *end = text + sizeof text - 1;
    char *p = text;
    *p = 0;
    for (int i = 2; i < count; i++) {
        if (i > 2) p = put_text(p, end, " ");
        p = put_text(p, end, word[i]);
    }
    *p++ = '\n';

    char *q = put_text(fresh, fresh + sizeof fresh, word[1]);
    put_text(q, fresh + sizeof fresh, "~");
    /* A device is written to, not replaced; nor can anything be renamed in /proc. */
    struct stat is;
    int renamed = stat(word[1], &is) || S_ISREG(is.st_mode), fd = -1;
    if (renamed) fd = open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        renamed = 0;
        fd = open(word[1], O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (fd < 0) return failed_errno("cannot write", word[1]);
    }
    int bad = write(fd, text, (size_t)(p - text)) != p - text;
    bad |= close(fd) != 0;
    if (!bad && renamed) bad = rename(fresh, word[1]) != 0;
    if (!bad) return 0;
    failed_errno("cannot write", word[1]);
    if (renamed) unlink(fresh);
    return -1;
}

static int do_hostname(int count, char **word) {
    (void)count;
    if (NOT_THE_GUEST()) return -1;
    if (sethostname(word[1], strlen(word[1]))) return failed_errno("cannot set the host name to", word[1]);
    return 0;
}

static const struct directive {
    const char *name;
    int (*act)(int count, char **word);
    unsigned char least, most; /* words after the name */
} directives[] = {
    {"mount", do_mount, 3, 4},         {"mkdir", do_mkdir, 1, MAX_WORDS},
    {"link", do_link, 2, 2},           {"console", do_console, 1, 1},
    {"entropy", do_entropy, 0, 0},     {"identity", do_identity, 1, 1},
    {"clock", do_clock, 1, 2},         {"net", do_net, 5, 5},
    {"hostname", do_hostname, 1, 1},   {"write", do_write, 1, MAX_WORDS},
    {"run", do_run, 1, MAX_WORDS},     {"start", do_start, 1, MAX_WORDS},
    {"wait", do_wait, 2, 3},           {"ready", do_ready, 0, 1},
    {"shell", do_shell, 0, MAX_WORDS},
};

/* Splits a line into words, replacing %n, %a and %%. Returns their number, or -1. */
static int split(const char *line, char *store, char **word) {
    char *to = store;
    const char *end = store + MAX_LINE;
    int count = 0;
    for (;;) {
        while (*line == ' ' || *line == '\t') line++;
        if (!*line || *line == '#') break;
        if (count == MAX_WORDS - 1) return failed("more than 31 words", 0);
        word[count++] = to;
        int quoted = 0;
        for (; *line; line++) {
            char c = *line;
            if (c == '"') {
                quoted = !quoted;
                continue;
            }
            if (!quoted && (c == ' ' || c == '\t')) break;
            if (quoted && c == '\\' && line[1]) {
                c = *++line;
                if (c == 'n') c = '\n';
                if (c == 't') c = '\t';
            } else if (c == '%' && (line[1] == 'n' || line[1] == 'a' || line[1] == '%')) {
                c = *++line;
                if (c != '%') {
                    to = c == 'n' ? put_number(to, end, vm_number) : put_text(to, end, vm_address);
                    continue;
                }
            }
            if (to + 1 >= end) return failed("the line is too long", 0);
            *to++ = c;
        }
        if (quoted) return failed("the closing quote is missing", 0);
        if (to + 1 >= end) return failed("the line is too long", 0);
        *to++ = 0;
    }
    word[count] = 0;
    return count;
}

static int interpret(const char *line) {
    char store[MAX_LINE];
    char *word[MAX_WORDS];
    int count = split(line, store, word);
    if (count <= 0) return count;
    for (size_t i = 0; i < sizeof directives / sizeof *directives; i++) {
        const struct directive *d = &directives[i];
        if (strcmp(word[0], d->name)) continue;
        if (count - 1 < d->least) return failed("too few words after", d->name);
        if (count - 1 > d->most) return failed("too many words after", d->name);
        return d->act(count, word);
    }
    return failed("unknown directive", word[0]);
}

/* Interprets the file; `only`, where given, is the one directive that counts. */
static int interpret_file(const char *only) {
    static char text[MAX_FILE + 1];
    int fd = open(file_name, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text);
    if (size < 0) return failed_errno("cannot read", file_name);
    close(fd);
    if (size > MAX_FILE) return failed("the file is longer than 16 KB", 0);
    text[size] = 0;

    int result = 0;
    for (char *line = text, *next; *line; line = next) {
        next = strchr(line, '\n');
        if (next)
            *next++ = 0;
        else
            next = line + strlen(line);
        line_number++;
        if (strlen(line) >= MAX_LINE) {
            result |= failed("the line is too long", 0);
            continue;
        }
        if (only && strncmp(line, only, strlen(only))) continue;
        result |= interpret(line);
    }
    return result;
}

int main(int count, char **word) {
    if (count > 1 && !strcmp(word[1], "-n")) {
        char text[16];
        file_name = count > 2 ? word[2] : "/init";
        if (interpret_file("identity")) return 1;
        char *p = put_number(text, text + sizeof text - 1, vm_number);
        *p++ = '\n';
        return write(1, text, (size_t)(p - text)) != p - text;
    }
    file_name = count > 1 ? word[1] : "/init";
    int result = interpret_file(0);
    if (getpid() == 1) reap_for_ever();
    return result ? 1 : 0;
}
