#!/bin/sh
# aurora-sgl as the services run it: as their user, with their settings and secrets.
#   sudo aurora-sgl status
# Files that it reads or writes lie where the user aurora may, such as /var/lib/aurora. What it does
# is written down under the name of who called sudo.
set -eu

command=/opt/aurora-sgl/bin/aurora-sgl
if [ "$(id -u)" -ne 0 ]; then
    echo "aurora-sgl: only root may act as the services' user: sudo aurora-sgl ..." >&2
    exit 1
fi

# systemd would replace $NAME in an argument; $$ is a dollar.
doubled() {
    rest=$1
    result=
    while :; do
        case $rest in
        *\$*)
            result=$result${rest%%\$*}\$\$
            rest=${rest#*\$}
            ;;
        *) break ;;
        esac
    done
    result=$result$rest
}
for argument in "$@"; do
    shift
    doubled "$argument"
    set -- "$@" "$result"
done

terminal=--pipe
if [ -t 0 ] && [ -t 1 ]; then
    terminal=--pty
fi
secrets=/etc/aurora/credentials
exec systemd-run --quiet --collect --wait "$terminal" --service-type=exec \
    --uid=aurora --gid=aurora --working-directory=/var/lib/aurora \
    --setenv=AURORA_HOME=/var/lib/aurora --setenv=HOME=/var/cache/aurora \
    --setenv=XDG_CACHE_HOME=/var/cache/aurora --setenv="LOGNAME=${SUDO_USER:-root}" \
    --property=EnvironmentFile=/etc/aurora/aurora.env \
    --property=LoadCredential=aurora_database_url:$secrets/aurora_database_url \
    --property=LoadCredential=aurora_notify_webhook:$secrets/aurora_notify_webhook \
    --property=LoadCredential=aurora_notify_secret:$secrets/aurora_notify_secret \
    --property=LoadCredential=aurora_notify_slack:$secrets/aurora_notify_slack \
    --property=StateDirectory=aurora --property=StateDirectoryMode=0700 \
    --property=CacheDirectory=aurora --property=CacheDirectoryMode=0700 \
    --property=UMask=0077 --property=NoNewPrivileges=yes \
    "$command" "$@"
