# The first sector of a disk that a PC's firmware boots: it brings what a table lists from
# the disk into memory, in pieces of 32 KiB, and enters Linux' setup code, which was put
# at 0x10000 (the kernel's Documentation/arch/x86/boot.rst). boot.go fills in the table,
# and the kernel's own header. An E on the serial port says that the firmware could not.
	.code16
	.globl	_start
_start:
	ljmp	$0, $begin
begin:
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	cld
	movb	%dl, drive
	movw	$table, %di
next:
	cmpl	$0, 4(%di)
	je	enter
piece:
	movl	(%di), %eax
	movl	%eax, sector
	movw	$packet, %si
	movb	drive, %dl
	movb	$0x42, %ah		# extended read
	int	$0x13
	jc	fail
	movl	8(%di), %eax
	movw	%ax, to
	shrl	$16, %eax
	movb	%al, to + 2
	movb	%ah, to + 5
	movw	$descriptors, %si
	movw	$0x4000, %cx		# words
	movb	$0x87, %ah		# move to anywhere in memory
	int	$0x15
	jc	fail
	addl	$64, (%di)
	addl	$0x8000, 8(%di)
	decl	4(%di)
	jnz	piece
	addw	$12, %di
	jmp	next
enter:
	movw	$0x1000, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %fs
	movw	%ax, %gs
	movw	%ax, %ss
	movw	$0xe000, %sp
	ljmp	$0x1020, $0
fail:
	movw	$0x3f8, %dx
	movb	$'E', %al
	outb	%al, %dx
	cli
	hlt

drive:	.byte	0
	.balign	4
packet:	.byte	16, 0			# of the extended read
	.word	64, 0, 0x3000		# sectors, offset, segment
sector:	.quad	0
	.balign	4
descriptors:
	.quad	0, 0
	.word	0xffff, 0		# from 0x30000
	.byte	3, 0x93, 0, 0
	.word	0xffff			# to
to:	.word	0
	.byte	0, 0x93, 0, 0
	.quad	0, 0

	.org	0x180
table:	.fill	48			# sector, pieces, address; the last one has no pieces
	.long	0, 0, 0
	.org	510
	.word	0xaa55
