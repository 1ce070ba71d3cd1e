# What every package's direct.sh starts with. The builder sets, beside PATH with the cross tools:
#   PKG    the package's folder in buildroot-external/package
#   OUT    the folder to fill; it becomes a part of the guest's root file system
#   JOBS   how many processes may run
#   DEP_x  the filled folder of each package x that package.yaml names in `needs`
# The working folder is the unpacked source (empty for a package without one).
set -eu
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=1767225600
umask 022
CROSS=riscv32-linux-musl
export CC=$CROSS-gcc AR=$CROSS-ar RANLIB=$CROSS-ranlib STRIP=$CROSS-strip
# Small before fast: of a guest's work little happens here, and every page is paid for by each of thousands of VMs.
export CFLAGS="-Os -ffunction-sections -fdata-sections -msave-restore -ffile-prefix-map=$PWD=."
export LDFLAGS="-static -Wl,--gc-sections -Wl,-z,noseparate-code -Wl,-z,norelro"
