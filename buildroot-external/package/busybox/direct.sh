# The configuration is there already.
make -s -j"$JOBS" CROSS_COMPILE=$CROSS- CC="$CC" HOSTCFLAGS=-w CFLAGS="$CFLAGS -w" LDFLAGS="$LDFLAGS" \
    CONFIG_EXTRA_CFLAGS= KBUILD_VERBOSE=0 busybox
mkdir -p "$OUT/bin"
$STRIP -o "$OUT/bin/busybox" busybox
chmod 755 "$OUT/bin/busybox"
# The shell finds all applets by itself; programs look for this one.
ln -s busybox "$OUT/bin/sh"
