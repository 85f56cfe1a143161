#!/bin/sh
# aurora-backup COMMAND: one backup into a folder of BACKUP_FOLDER that is named after the moment
# (UTC), then the oldest go until BACKUP_KEEP are left. COMMAND is aurora-sgl. Exit code 1 and a
# line: no backup, or not a whole one; then none goes.
set -eu

say() { printf 'aurora-backup: %s\n' "$*" >&2; }
fail() {
    say "$@"
    exit 1
}

[ "$#" -eq 1 ] || fail "say which command makes the backup, such as /opt/aurora-sgl/bin/aurora-sgl"
command=$1
root=${BACKUP_FOLDER:-}
keep=${BACKUP_KEEP:-7}
case $root in
/*) ;;
*) fail "BACKUP_FOLDER is no absolute path: '$root'" ;;
esac
case $keep in
'' | *[!0-9]* | 0* | ??????*) fail "BACKUP_KEEP is no number from 1 on: '$keep'" ;;
*) ;;
esac
[ -d "$root" ] || fail "$root is no folder: make it, or mount it"

folder=$root/$(date -u +%Y%m%dT%H%M%SZ)
code=0
report=$("$command" db backup --json "$folder") || code=$?
# What an interrupted one left: hidden names of the same form. No two run at once (systemd).
for left in "$root"/.[0-9]*T[0-9]*Z.*; do
    [ ! -d "$left" ] || rm -rf -- "$left"
done
if [ "$code" -ne 0 ]; then
    # Weights that are missing now may be in an older one.
    [ ! -d "$folder" ] || fail "$folder is not whole (exit code $code); all older ones are kept"
    fail "no backup was made (exit code $code)"
fi

set -- "$root"/[0-9][0-9][0-9][0-9][0-9][0-9][0-9][0-9]T[0-9][0-9][0-9][0-9][0-9][0-9]Z
while [ "$#" -gt "$keep" ]; do
    # By name the oldest is the first, but after a clock that was set back this one might be.
    if [ "$1" != "$folder" ] && [ -f "$1/manifest.json" ]; then
        rm -rf -- "$1"
        say "$1 is older than $keep others and went"
    fi
    shift
done
say "$folder is whole: $(printf '%s' "$report" | tr -s '[:space:]' ' ')"
