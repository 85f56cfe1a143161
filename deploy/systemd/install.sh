#!/bin/sh
# Puts Aurora-SGL's services on a machine with systemd, or into a folder for a package. Starts
# nothing. Running it again brings files of a new release and leaves settings, secrets and data
# alone.
set -eu
umask 022

usage() {
    cat <<'END'
usage: install.sh [--venv DIR] [--prefix DIR] [--destdir DIR] [--dry-run] [--uninstall]

  --venv DIR     virtual environment in which aurora-sgl is installed (/opt/aurora-sgl)
  --prefix DIR   where units and scripts go (/usr/local; a package takes /usr)
  --destdir DIR  stage everything below this folder: for packages; no user is made
  --dry-run      say what would be done, change nothing
  --uninstall    stop the services, take the files away; settings, secrets, data and user stay
END
}

fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

say() { printf '%s\n' "$*"; }

# -- What is asked for -----------------------------------------------------------------------------

venv=/opt/aurora-sgl
prefix=/usr/local
destdir=
dry=no
uninstall=no

while [ "$#" -gt 0 ]; do
    case $1 in
    --venv | --prefix | --destdir)
        [ "$#" -gt 1 ] || fail "$1 needs a folder"
        case $1 in
        --venv) venv=$2 ;;
        --prefix) prefix=$2 ;;
        *) destdir=$2 ;;
        esac
        [ -n "$2" ] || fail "$1 needs a folder"
        shift 2
        ;;
    --dry-run)
        dry=yes
        shift
        ;;
    --uninstall)
        uninstall=yes
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) fail "there is no argument '$1'; see --help" ;;
    esac
done

# A path that is written into units: systemd gives a meaning to spaces, quotes, %, $ and
# backslashes.
check_written() {
    case $2 in
    /*) ;;
    *) fail "$1 is no absolute path: '$2'" ;;
    esac
    case $2 in
    *[!A-Za-z0-9/._+-]*) fail "$1 may have letters, digits and / . _ + - only: '$2'" ;;
    */../* | */.. | */./* | */. | *//* | /) fail "$1 is no plain path: '$2'" ;;
    esac
}
venv=${venv%/}
prefix=${prefix%/}
check_written --venv "$venv"
check_written --prefix "$prefix"
if [ -n "$destdir" ]; then
    case $destdir in
    /*) ;;
    *) fail "--destdir is no absolute path: '$destdir'" ;;
    esac
    destdir=${destdir%/}
    [ -n "$destdir" ] || fail "--destdir / is the machine itself: leave it out"
fi

source=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
etc=/etc/aurora
units=$prefix/lib/systemd/system
scripts=$prefix/lib/aurora-sgl
services="aurora-server.service aurora-scheduler.service aurora-dashboard.service"
services="$services aurora-backup.service"
others="aurora-backup.timer aurora.target"
secrets="aurora_database_url aurora_notify_webhook aurora_notify_secret aurora_notify_slack"
secrets="$secrets aurora_scheduler_api_token hf_token"

for name in $services $others aurora.env.example aurora.sysusers aurora-backup.sh aurora-sgl.sh; do
    [ -f "$source/$name" ] || fail "$source/$name is missing: run install.sh where it lies"
done

live=no
[ -n "$destdir" ] || live=yes

# -- What can't be done is said before anything is -------------------------------------------------

# Folders that the units hide from their processes.
check_visible() {
    case $2 in
    /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
        fail "$1 is at $2, where the services can't see it: put it elsewhere, such as /opt"
        ;;
    esac
}

check_venv() {
    command=$venv/bin/aurora-sgl
    [ -x "$command" ] || fail "$command is missing: install aurora-sgl there, or say --venv"
    check_visible "the environment" "$(readlink -f -- "$venv")/"
    check_visible "its Python" "$(readlink -f -- "$venv/bin/python")"
    place=$("$venv/bin/python" -c 'import aurora_sgl; print(aurora_sgl.__file__)' 2>/dev/null) ||
        fail "$venv/bin/python can't import aurora_sgl"
    check_visible "the package aurora_sgl" "$place"
}

check_systemd() {
    for tool in systemctl systemd-sysusers getent; do
        command -v "$tool" >/dev/null 2>&1 || fail "$tool is missing: this machine has no systemd"
    done
    version=$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge 250 ] || fail "systemd ${version:-?} is too old: 250 or newer is needed"
}

check_user() {
    shell=$(getent passwd aurora | cut -d: -f7) || true
    case $shell in
    '' | */nologin | */false) ;;
    *) fail "the user aurora logs in with $shell: it is a person's, the services need their own" ;;
    esac
}

if [ "$live" = yes ]; then
    [ "$dry" = yes ] || [ "$(id -u)" -eq 0 ] || fail "only root can do this; see --dry-run"
    check_systemd
    if [ "$uninstall" = no ]; then
        check_user
        check_venv
    fi
fi

# -- Steps -----------------------------------------------------------------------------------------

act() {
    if [ "$dry" = yes ]; then
        say "would run: $*"
    else
        "$@"
    fi
}

# put MODE SOURCE PLACE: a file with the chosen paths in it, written beside its place and renamed
# into it.
put() {
    place=$destdir$3
    if [ "$dry" = yes ]; then
        say "would write $place"
        return
    fi
    mkdir -p -- "${place%/*}"
    new=$place.new.$$
    sed "s|/opt/aurora-sgl/|$venv/|g; s|/usr/local/lib/aurora-sgl/|$scripts/|g" \
        "$source/$2" >"$new"
    chmod "$1" "$new"
    mv -f -- "$new" "$place"
    say "$place"
}

# keep MODE SOURCE PLACE: the same, but what is there stays as it is, were it a dangling link.
keep() {
    if [ -e "$destdir$3" ] || [ -h "$destdir$3" ]; then
        say "$destdir$3 stays as it is"
    else
        put "$@"
    fi
}

keep_secret() {
    place=$destdir$etc/credentials/$1
    if [ -e "$place" ] || [ -h "$place" ]; then
        return
    fi
    if [ "$dry" = yes ]; then
        say "would make $place, empty"
        return
    fi
    (umask 077 && : >"$place")
    say "$place, empty"
}

folder() {
    [ -d "$destdir$2" ] || act mkdir -p -m "$1" -- "$destdir$2"
}

take_away() {
    place=$destdir$1
    [ -e "$place" ] || [ -h "$place" ] || return 0
    act rm -f -- "$place"
    [ "$dry" = yes ] || say "$place is gone"
}

reload() {
    if [ -d /run/systemd/system ]; then
        act systemctl daemon-reload
    fi
}

install_all() {
    for name in $services $others; do
        put 0644 "$name" "$units/$name"
    done
    put 0644 aurora.sysusers "$prefix/lib/sysusers.d/aurora-sgl.conf"
    put 0755 aurora-backup.sh "$scripts/aurora-backup"
    put 0755 aurora-sgl.sh "$prefix/sbin/aurora-sgl"
    folder 0755 $etc
    folder 0700 $etc/credentials
    put 0644 aurora.env.example $etc/aurora.env.example
    keep 0640 aurora.env.example $etc/aurora.env
    for name in $secrets; do
        keep_secret "$name"
    done
    [ "$live" = yes ] || return 0
    act systemd-sysusers "$prefix/lib/sysusers.d/aurora-sgl.conf"
    reload
    say "At first: MODEL in $etc/aurora.env, secrets in $etc/credentials, then"
    say "  systemctl enable --now aurora.target aurora-server aurora-scheduler aurora-dashboard" \
        "aurora-backup.timer"
    say "After an upgrade: systemctl restart aurora.target"
}

uninstall_all() {
    if [ "$live" = yes ] && [ -d /run/systemd/system ]; then
        for name in aurora.target aurora-backup.timer $services; do
            if [ -e "$units/$name" ]; then
                act systemctl disable --now --quiet "$name"
            fi
        done
    fi
    for name in $services $others; do
        take_away "$units/$name"
    done
    take_away "$prefix/lib/sysusers.d/aurora-sgl.conf"
    take_away "$scripts/aurora-backup"
    take_away "$prefix/sbin/aurora-sgl"
    take_away $etc/aurora.env.example
    if [ -d "$destdir$scripts" ]; then
        act rmdir -- "$destdir$scripts"
    fi
    [ "$live" = no ] || reload
    say "What stays: $etc, /var/lib/aurora, /var/lib/aurora-backups, /var/cache/aurora," \
        "the user aurora, what systemctl edit made"
}

if [ "$uninstall" = yes ]; then
    uninstall_all
else
    install_all
fi
