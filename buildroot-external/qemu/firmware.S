# What a kernel asks of its firmware on `qemu-system-riscv32 -M virt`, and no more: SBI's base, timer and system reset.
# For `cargo xtask image --try qemu`; the distribution has OpenSBI for 64 bit only. QEMU enters with the hart's number in
# a0, the device tree's address in a1, and in a2 that of a block whose third word is the kernel's entry.

.equ CLINT_MTIMECMP, 0x02004000
.equ TEST, 0x00100000 # QEMU's test device ends the machine
.equ STIP, 1 << 5
.equ MTIE, 1 << 7
.equ NOT_SUPPORTED, -2

	.section .text
	.globl _start
_start:
	lw t0, 8(a2)
	csrw mepc, t0
	la t0, trap
	csrw mtvec, t0
	la t0, saved
	csrw mscratch, t0
	li t0, 0xb1ff # all but the calls of S and M mode
	csrw medeleg, t0
	li t0, 0x222 # the interrupts of S mode
	csrw mideleg, t0
	li t0, -1
	csrw pmpaddr0, t0
	li t0, 0x1f # everything may be read, written and executed
	csrw pmpcfg0, t0
	li t0, 7 # cycle, time and instret may be read
	csrw mcounteren, t0
	li t0, CLINT_MTIMECMP
	li t1, -1
	sw t1, 0(t0)
	sw t1, 4(t0)
	li t0, 0x1800
	csrc mstatus, t0
	li t0, 0x0800 # mret goes to S mode
	csrs mstatus, t0
	csrw satp, zero
	mret

	.balign 4
trap:
	csrrw sp, mscratch, sp
	sw t0, 0(sp)
	sw t1, 4(sp)
	csrr t0, mcause
	bltz t0, timer_rings
	li t1, 9 # a call from S mode
	bne t0, t1, failed
	csrr t0, mepc
	addi t0, t0, 4
	csrw mepc, t0
	li t0, 0x10
	beq a7, t0, base
	li t0, 0x54494d45 # TIME
	beq a7, t0, set_timer
	li t0, 0x53525354 # SRST
	beq a7, t0, reset
unknown:
	li a0, NOT_SUPPORTED
	li a1, 0
	j back

timer_rings:
	# The kernel's now; it asks for the next one.
	li t1, MTIE
	csrc mie, t1
	li t1, STIP
	csrs mip, t1
	j back

set_timer:
	bnez a6, unknown
	li t0, CLINT_MTIMECMP
	li t1, -1
	sw t1, 4(t0) # not before both halves are there
	sw a0, 0(t0)
	sw a1, 4(t0)
	li t1, STIP
	csrc mip, t1
	li t1, MTIE
	csrs mie, t1
	j none

base:
	li t0, 7
	bgeu a6, t0, unknown
	beqz a6, version
	li t0, 3
	beq a6, t0, probe
	j none # implementation, its version, vendor, architecture: 0
version:
	li a1, 3 # SBI 0.3
	j done
probe:
	mv t1, a0
	li a1, 1
	li t0, 0x10
	beq t1, t0, done
	li t0, 0x54494d45
	beq t1, t0, done
	li t0, 0x53525354
	beq t1, t0, done
none:
	li a1, 0
done:
	li a0, 0
back:
	lw t0, 0(sp)
	lw t1, 4(sp)
	csrrw sp, mscratch, sp
	mret

reset:
	li t1, TEST
	li t0, 1
	beq a1, t0, failed # because of a failure
	li t0, 0x5555 # power off
	beqz a0, write_test
	li t0, 0x7777 # reboot
	j write_test
failed:
	li t1, TEST
	li t0, 0x13333 # fail, with status 1
write_test:
	sw t0, 0(t1)
1:	j 1b

	.balign 16
saved:
	.zero 16
