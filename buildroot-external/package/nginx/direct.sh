# All modules that can be left out are, so a new version's are too.
mkdir cross
cp "$PKG/nginx-cc" cross/
PATH=$PWD/cross:$PATH
without=$(./configure --help | grep -oE -- '--without-http_[a-z_]+' | sort -u)
# -V shows these options: no path of the building machine may be among them.
./configure --crossbuild=Linux::riscv32 --with-cc=nginx-cc --prefix=/usr --sbin-path=/usr/sbin/nginx \
    --with-cc-opt='-Os -ffunction-sections -fdata-sections -msave-restore -Wno-error' \
    --with-ld-opt="-Wl,--gc-sections -Wl,-z,noseparate-code -Wl,-z,norelro" \
    --conf-path=/etc/nginx/nginx.conf --pid-path=/run/nginx.pid --lock-path=/run/nginx.lock \
    --error-log-path=/var/log/nginx/error.log --http-log-path=/var/log/nginx/access.log \
    --http-client-body-temp-path=/tmp/nginx-body --user=root --group=root \
    --without-pcre --without-http-cache --without-select_module $without --with-http_stub_status_module
make -s -j"$JOBS"
mkdir -p "$OUT/usr/sbin" "$OUT/var/log/nginx" "$OUT/run" "$OUT/tmp"
$STRIP -o "$OUT/usr/sbin/nginx" objs/nginx
chmod 755 "$OUT/usr/sbin/nginx"
