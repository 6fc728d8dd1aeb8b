# Runs pieces of code that a host sends, one after the other, in one shell.
#
# Requests come on descriptor 0, each up to a NUL: "c" and code, or "s" and fresh random bytes in hexadecimal. Answers go to
# descriptor 3: a line of kind, length and number of bytes cut off, then text of that length. Programs that the code starts have
# neither descriptor.
exec 200<&0 201>&3 202>&1 203>&2 0</dev/null 3>&-
hearth_answer() { printf '%s %d 0\n%s' "$1" "${#2}" "$2" >&201; }
hearth_hooks=()
on_clone() { hearth_hooks+=("$*"); } # run in each clone, before code runs there
# Ends a piece of code that waits for a program. One that does not is ended with the shell.
trap 'return 130 2>/dev/null' INT
hearth_answer n ''
while IFS= read -r -d '' -u 200 hearth_code; do
    if [[ $hearth_code == s* ]]; then
        RANDOM=$((16#${hearth_code:1:7}))
        for hearth_hook in "${hearth_hooks[@]}"; do eval "$hearth_hook"; done
        hearth_answer n ''
        continue
    fi
    exec 1>&202 2>&203
    source /dev/fd/204 204<<<"${hearth_code:1}" 200<&- 201>&- 202>&- 203>&-
    hearth_answer v "$?"
done
