# The cross toolchain: the distribution's riscv64 compiler and binutils with a sysroot of our own. In the environment:
#   OUT      the folder to fill
#   TOOLS    this folder
#   MUSL     musl's source: an upstream tree, or the copy in a Zig distribution (lib/libc)
#   HEADERS  the kernel's headers for user space
#   JOBS     how many processes may run
set -eu
export LC_ALL=C
umask 022
target=riscv64-linux-gnu
sysroot=$OUT/sysroot
mkdir -p "$OUT/bin" "$sysroot/include" "$sysroot/lib" objects

cp "$TOOLS/riscv32-linux-musl-gcc" "$OUT/bin/"
cp "$TOOLS/musl.specs" "$OUT/"
for tool in ar as ld nm objcopy objdump ranlib readelf size strip; do
    ln -s "$(command -v $target-$tool)" "$OUT/bin/riscv32-linux-musl-$tool"
done

# Both layouts have the same src/, arch/ and crt/; Zig has generated two headers that upstream generates when built.
if [ -d "$MUSL/musl/src" ]; then
    musl=$MUSL/musl
    bits=$MUSL/include/riscv32-linux-musl/bits
else
    musl=$MUSL
    bits=generated
    mkdir -p generated
    sed -f "$musl/tools/mkalltypes.sed" "$musl/arch/riscv32/bits/alltypes.h.in" "$musl/include/alltypes.h.in" \
        > generated/alltypes.h
    cp "$musl/arch/riscv32/bits/syscall.h.in" generated/syscall.h
    sed -n -e 's/__NR_/SYS_/p' < "$musl/arch/riscv32/bits/syscall.h.in" >> generated/syscall.h
fi
(cd "$HEADERS" && find . -name '*.h') | while read -r header; do
    mkdir -p "$sysroot/include/${header%/*}"
    cp "$HEADERS/$header" "$sysroot/include/$header"
done
cp -R "$musl/include/." "$sysroot/include/"
mkdir -p "$sysroot/include/bits"
cp "$musl"/arch/generic/bits/*.h "$sysroot/include/bits/"
cp "$musl"/arch/riscv32/bits/*.h "$sysroot/include/bits/"
cp "$bits/alltypes.h" "$bits/syscall.h" "$sysroot/include/bits/"
find "$sysroot/include" -name '*.in' -exec rm -f {} +

# rv32ima would pick the multilib rv32ia, which has no multiplication: ask for rv32im, it has no atomics to offer.
libgcc=$(riscv64-unknown-elf-gcc -march=rv32im -mabi=ilp32 -print-libgcc-file-name)
case $libgcc in
*/rv32im/ilp32/libgcc.a) ;;
*) echo "gcc-riscv64-unknown-elf has no libgcc for rv32im/ilp32: it names $libgcc" >&2; exit 1 ;;
esac
cp "$libgcc" "$sysroot/lib/libgcc.a"

if [ ! -f "$musl/src/internal/version.h" ]; then
    mkdir -p generated
    echo "#define VERSION \"$(cat "$musl/VERSION")\"" > generated/version.h
fi
flags="-std=c99 -nostdinc -ffreestanding -frounding-math -fno-strict-aliasing -Wa,--noexecstack
    -D_XOPEN_SOURCE=700 -I$musl/arch/riscv32 -I$musl/arch/generic -I$musl/src/include -I$musl/src/internal -Igenerated
    -I$sysroot/include -Os -pipe -fomit-frame-pointer -fno-unwind-tables -fno-asynchronous-unwind-tables
    -ffunction-sections -fdata-sections -fno-stack-protector -fno-pic -fno-pie -w
    -march=rv32ima_zicsr_zifencei -mabi=ilp32 -ffile-prefix-map=$musl=musl"
# With an architecture's own version of a file, the general one is left out.
(cd "$musl" && find src \( -regex 'src/[^/]*/[^/]*\.c' -o -path 'src/malloc/mallocng/*.c' \
    -o -path 'src/*/riscv32/*.[csS]' \) -print | LC_ALL=C sort) > all
: > sources
while read -r file; do
    name=${file##*/}
    name=${name%.*}
    case $file in
    */riscv32/*) ;;
    *) if grep -q "^${file%/*}/riscv32/$name\.[csS]\$" all; then continue; fi ;;
    esac
    echo "$file" >> sources
done < all
cat > compile <<'S'
for file; do
    object=$(echo "${file%.*}" | tr / _).o
    $target-gcc $flags -c "$musl/$file" -o "objects/$object" || exit 255
done
S
export target flags musl
xargs -P "$JOBS" -n 16 sh compile < sources
# In the order of the names, without dates and owners.
(cd objects && ls | LC_ALL=C sort | xargs $target-ar rcD "$sysroot/lib/libc.a")
$target-ranlib -D "$sysroot/lib/libc.a"
for crt in crt1 crti crtn; do
    file=$(ls "$musl/crt/riscv32/$crt".* 2>/dev/null || echo "$musl/crt/$crt.c")
    $target-gcc $flags -DCRT -c "$file" -o "$sysroot/lib/$crt.o"
done
for library in crypt dl m pthread resolv rt util xnet; do
    $target-ar rcD "$sysroot/lib/lib$library.a"
done
