# Buildroot's external toolchain from the direct builder's: the same compiler, library and headers, laid out as
# Buildroot expects and under its names. In the environment:
#   OUT     the folder to fill
#   TOOLS   this folder
#   DIRECT  the direct builder's toolchain
set -eu
export LC_ALL=C
umask 022
mkdir -p "$OUT/bin" "$OUT/sysroot/usr/lib"
cp "$TOOLS/riscv32-linux-gcc" "$OUT/bin/"
sed 's,%R/include,%R/usr/include,g' "$DIRECT/musl.specs" > "$OUT/musl.specs"
for tool in ar as ld nm objcopy objdump ranlib readelf size strip strings addr2line; do
    ln -s "$(command -v riscv64-linux-gnu-$tool)" "$OUT/bin/riscv32-linux-$tool"
done
for tool in ar nm ranlib; do
    ln -s riscv32-linux-$tool "$OUT/bin/riscv32-linux-gcc-$tool"
done
ln -s riscv32-linux-gcc "$OUT/bin/riscv32-linux-cc"
printf '#!/bin/sh\nexec "${0%%/*}/riscv32-linux-gcc" -E "$@"\n' > "$OUT/bin/riscv32-linux-cpp"
chmod 755 "$OUT/bin/riscv32-linux-cpp"
cp -R "$DIRECT/sysroot/include" "$OUT/sysroot/usr/include"
cp -R "$DIRECT/sysroot/lib" "$OUT/sysroot/lib"
# Some links ask for it; C without exceptions takes nothing from it.
riscv64-linux-gnu-ar rcD "$OUT/sysroot/lib/libgcc_eh.a"
