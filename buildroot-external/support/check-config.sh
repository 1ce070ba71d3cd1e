# check-config.sh WHAT CONFIG FRAGMENT...: every setting of the fragments must be in the .config that came out; of a
# symbol that is set more than once the last one counts.
set -eu
what=$1 config=$2
shift 2
awk -v what="$what" '
function parse(line) {
    sub(/^[ \t]+/, "", line); sub(/[ \t]+$/, "", line)
    symbol = ""
    if (line ~ /^#[ \t]*(CONFIG|BR2)_[A-Za-z0-9_]+ is not set$/) {
        sub(/^#[ \t]*/, "", line); sub(/ is not set$/, "", line)
        symbol = line; value = "n"
    } else if (line ~ /^(CONFIG|BR2)_[A-Za-z0-9_]+=/) {
        at = index(line, "=")
        symbol = substr(line, 1, at - 1); value = substr(line, at + 1)
    }
}
FNR == 1 { file++ }
{ parse($0) }
symbol == "" { next }
file == 1 { is[symbol] = value; next }
{
    if (!(symbol in wanted)) order[++n] = symbol
    wanted[symbol] = value; place[symbol] = FILENAME ":" FNR
}
END {
    for (i = 1; i <= n; i++) {
        symbol = order[i]
        found = symbol in is ? is[symbol] : "n"
        if (found == wanted[symbol]) continue
        if (!lost++) print what ": settings that did not survive configuration:"
        print "  " place[symbol] ": " symbol "=" wanted[symbol] " is " \
            (symbol in is ? (is[symbol] == "n" ? "off" : is[symbol]) : "not") " in .config"
    }
    if (lost) {
        print "The symbol may be misspelt, unknown to this version, or depend on another that is off (or, where it " \
            "should be off, be selected by another). Correct the fragment."
        exit 1
    }
}' "$config" "$@" >&2
