mkdir -p "$OUT/bin"
(cd "$PKG/src" && $CC $CFLAGS -ffile-prefix-map="$PWD"=. -Wall -Wextra -Werror $LDFLAGS -s -o "$OUT/bin/lg-init" \
    main.c machine.c net.c process.c)
