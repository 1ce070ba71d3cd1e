./configure --host=riscv32-linux --prefix=/usr --disable-netlink --disable-pretty-dump
make -s -j"$JOBS" ethtool
mkdir -p "$OUT/usr/sbin"
$STRIP -o "$OUT/usr/sbin/ethtool" ethtool
chmod 755 "$OUT/usr/sbin/ethtool"
