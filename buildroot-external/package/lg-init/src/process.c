/* Programs: run, start, the shell on the console, and what process 1 owes to orphans. */
#include "lg-init.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static char console[64] = "/dev/console";
static char *environment[5];

int do_console(int count, char **word) {
    (void)count;
    int fd = open(word[1], O_RDWR | O_NOCTTY);
    if (fd < 0) return failed_errno("cannot open", word[1]);
    put_text(console, console + sizeof console, word[1]);
    for (int i = 0; i < 3; i++)
        if (fd != i && dup2(fd, i) < 0) return failed_errno("cannot use", word[1]);
    if (fd > 2) close(fd);
    return 0;
}

static void make_environment(void) {
    static char number[24];
    const char *end = number + sizeof number;
    put_number(put_text(number, end, "LG_VM="), end, vm_number);
    environment[0] = "PATH=/bin:/sbin:/usr/bin:/usr/sbin";
    environment[1] = "HOME=/";
    environment[2] = "TERM=linux";
    environment[3] = number;
}

/* Where the program is; busybox, for a name that no folder has. */
static const char *find_program(const char *name, char path[MAX_LINE]) {
    static const char *const folders[] = {"/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/"};
    if (strchr(name, '/')) return name;
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++) {
        put_text(put_text(path, path + MAX_LINE, folders[i]), path + MAX_LINE, name);
        if (!access(path, X_OK)) return path;
    }
    return "/bin/busybox"; /* it goes by word[0] */
}

/* How the new process stands to the console. */
enum attach { SHARED, DETACHED, CONTROLLING };

/* Returns its process number, or -1 after telling why. */
static pid_t spawn(char **word, const char *as, enum attach attach) {
    char path[MAX_LINE];
    const char *program = find_program(word[0], path);
    char *first = word[0];
    make_environment();
    volatile int error = 0;
    /* vfork: the page tables of process 1 need no copy. The child only makes system calls. */
    pid_t pid = vfork();
    if (pid == 0) {
        if (attach == CONTROLLING) {
            setsid();
            int fd = open(console, O_RDWR);
            if (fd >= 0) {
                ioctl(fd, TIOCSCTTY, 0);
                for (int i = 0; i < 3; i++) dup2(fd, i);
                if (fd > 2) close(fd);
            }
        }
        if (attach == DETACHED) {
            int fd = open("/dev/null", O_RDONLY);
            if (fd >= 0) {
                dup2(fd, 0);
                if (fd > 2) close(fd);
            }
        }
        if (as) word[0] = (char *)as;
        execve(program, word, environment);
        error = errno;
        _exit(127);
    }
    word[0] = first;
    if (pid < 0) {
        failed_errno("cannot make a process for", first);
        return -1;
    }
    if (error) {
        while (waitpid(pid, 0, 0) < 0 && errno == EINTR) {
        }
        errno = error;
        failed_errno("cannot run", first);
        return -1;
    }
    return pid;
}

int do_run(int count, char **word) {
    (void)count;
    int status = 0;
    pid_t pid = spawn(word + 1, 0, SHARED);
    if (pid < 0) return -1;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) return failed_errno("cannot wait for", word[1]);
    if (!status) return 0;
    char text[128];
    const char *end = text + sizeof text;
    char *p = put_text(text, end, word[1]);
    p = put_text(p, end, WIFSIGNALED(status) ? " was killed by signal " : " ended with status ");
    put_number(p, end, (uint32_t)(WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)));
    return failed(text, 0);
}

int do_start(int count, char **word) {
    (void)count;
    return spawn(word + 1, 0, DETACHED) < 0 ? -1 : 0;
}

/* Whether something listens on a TCP port. A socket that shares addresses can be bound beside any other that
 * does, except a listening one: so this asks the kernel, costs the server nothing and cannot get in its way.
 */
static int listens(unsigned port) {
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    int bad = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) ||
              bind(fd, (struct sockaddr *)&any, sizeof any);
    int error = errno;
    close(fd);
    errno = error;
    return !bad ? 0 : error == EADDRINUSE ? 1 : -1;
}

static int wait_for(unsigned port, uint64_t seconds) {
    struct timespec start, now, pause = {.tv_nsec = 1000000};
    clock_gettime(CLOCK_MONOTONIC, &start);
    for (;;) {
        int found = listens(port);
        if (found < 0) return failed_errno("cannot look at the port", 0);
        if (found) return 0;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if ((uint64_t)(now.tv_sec - start.tv_sec) >= seconds) return failed("nothing listens on the port", 0);
        nanosleep(&pause, 0);
    }
}

static int get_port(const char *text, unsigned *port) {
    uint64_t value;
    if (get_number(text, &value) || value > 65535) return failed("not a port", text);
    *port = (unsigned)value;
    return 0;
}

int do_wait(int count, char **word) {
    unsigned port;
    uint64_t seconds = 60;
    if (strcmp(word[1], "tcp")) return failed("can only wait for tcp, not", word[1]);
    if (get_port(word[2], &port)) return -1;
    if (count > 3 && get_number(word[3], &seconds)) return failed("not a number of seconds", word[3]);
    return wait_for(port, seconds);
}

int do_ready(int count, char **word) {
    unsigned port = 80;
    if (count > 1 && get_port(word[1], &port)) return -1;
    if (port && wait_for(port, 60)) return -1;
    char text[24];
    const char *end = text + sizeof text - 1;
    char *p = put_number(put_text(text, end, "READY "), end, vm_number);
    *p++ = '\n';
    if (write(1, text, (size_t)(p - text)) < 0) return failed_errno("cannot write to the console", 0);
    return 0;
}

/* What busybox's reboot, poweroff and halt send to process 1. */
static void on_request(int signal_number) {
    if (NOT_THE_GUEST()) return;
    unsigned how = signal_number == SIGTERM   ? RB_AUTOBOOT
                   : signal_number == SIGUSR2 ? RB_POWER_OFF
                                              : RB_HALT_SYSTEM;
    reboot((int)how);
}

static void listen_to_requests(void) {
    static const int numbers[] = {SIGTERM, SIGUSR1, SIGUSR2};
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_request;
    for (unsigned i = 0; i < 3; i++) sigaction(numbers[i], &action, 0);
}

void reap_for_ever(void) {
    struct timespec pause = {.tv_sec = 1};
    listen_to_requests();
    for (;;)
        if (waitpid(-1, 0, 0) < 0 && errno == ECHILD) nanosleep(&pause, 0);
}

int do_shell(int count, char **word) {
    static char *standard[] = {"/bin/sh", 0};
    if (getpid() != 1) return failed("only process 1 gives the console to a shell", 0);
    char **program = count > 1 ? word + 1 : standard;
    listen_to_requests();
    for (;;) {
        struct timespec pause = {.tv_sec = 1};
        pid_t shell = spawn(program, count > 1 ? 0 : "-sh", CONTROLLING), gone;
        while (shell > 0 && (gone = waitpid(-1, 0, 0)) != shell)
            if (gone < 0 && errno == ECHILD) break;
        nanosleep(&pause, 0); /* a console at its end must not become a busy loop */
    }
}
