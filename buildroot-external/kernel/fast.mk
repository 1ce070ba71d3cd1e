# Objects of the kernel that are compiled for speed, all others for size: 96 of 564, with nine tenths of what a boot
# and a request execute in the kernel's C code. Compiling all for speed makes the Image 451 KB larger, this 221 KB.
#
# make reads this file before any other (its variable MAKEFILES, set by both builders), so it must not hold a target.
# Kbuild hands KBUILD_CFLAGS down in the environment, and reads it anew for each object: $@ is the object's path then.
LG_FAST += arch/riscv/kernel/process.o
LG_FAST += arch/riscv/mm/fault.o arch/riscv/mm/init.o
LG_FAST += drivers/char/random.o
LG_FAST += drivers/irqchip/irq-sifive-plic.o
LG_FAST += drivers/net/virtio_net.o
LG_FAST += drivers/of/base.o drivers/of/property.o
LG_FAST += drivers/virtio/virtio_mmio.o drivers/virtio/virtio_ring.o
LG_FAST += fs/attr.o fs/dcache.o fs/eventpoll.o fs/file.o fs/file_table.o fs/inode.o fs/libfs.o fs/namei.o \
	fs/open.o fs/read_write.o fs/splice.o fs/stat.o
LG_FAST += fs/proc/generic.o fs/proc/proc_sysctl.o
LG_FAST += kernel/fork.o kernel/params.o kernel/softirq.o
LG_FAST += kernel/irq/chip.o kernel/irq/handle.o kernel/irq/irqdesc.o kernel/irq/irqdomain.o \
	kernel/irq/spurious.o
LG_FAST += kernel/locking/rwsem.o
LG_FAST += kernel/printk/printk.o kernel/printk/printk_ringbuffer.o
LG_FAST += kernel/sched/build_utility.o kernel/sched/core.o kernel/sched/fair.o
LG_FAST += kernel/time/hrtimer.o kernel/time/time.o kernel/time/timekeeping.o kernel/time/timer.o
LG_FAST += lib/checksum.o lib/fdt.o lib/fdt_ro.o lib/find_bit.o lib/idr.o lib/iov_iter.o lib/kobject.o \
	lib/kobject_uevent.o lib/kstrtox.o lib/maple_tree.o lib/radix-tree.o lib/rbtree.o lib/scatterlist.o lib/string.o \
	lib/strncpy_from_user.o lib/vsprintf.o lib/xarray.o
LG_FAST += lib/crypto/blake2s-generic.o lib/crypto/chacha.o
LG_FAST += lib/math/div64.o
LG_FAST += mm/filemap.o mm/memblock.o mm/memory.o mm/mmap.o mm/page_alloc.o mm/percpu.o mm/rmap.o \
	mm/slab_common.o mm/slub.o mm/swap.o mm/util.o
LG_FAST += net/socket.o
LG_FAST += net/core/dev.o net/core/gro.o net/core/skbuff.o net/core/sock.o
LG_FAST += net/ethernet/eth.o
LG_FAST += net/ipv4/af_inet.o net/ipv4/fib_trie.o net/ipv4/inet_connection_sock.o net/ipv4/inet_hashtables.o \
	net/ipv4/inet_timewait_sock.o net/ipv4/ip_input.o net/ipv4/ip_output.o net/ipv4/raw.o net/ipv4/route.o \
	net/ipv4/tcp.o net/ipv4/tcp_input.o net/ipv4/tcp_ipv4.o net/ipv4/tcp_metrics.o net/ipv4/tcp_minisocks.o \
	net/ipv4/tcp_offload.o net/ipv4/tcp_output.o net/ipv4/tcp_rate.o

KBUILD_CFLAGS += $(if $(filter $(LG_FAST),$@),-O2)
