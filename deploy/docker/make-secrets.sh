#!/bin/sh
# Makes the files of secrets/ that compose.yaml mounts; one that is there stays as it is. Run it
# again after an upgrade: it adds what is new. To change a secret, edit its file and start the
# services anew (of PostgreSQL's password: change it in the database too).
#
# Containers read these files under users of their own, hence their mode; the folder is yours alone,
# so nobody else on this machine gets to them.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
chmod 700 secrets

random() {
  od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# keep NAME VALUE WORDS: a secret, and what it is for.
keep() {
  if [ -e "secrets/$1" ]; then
    echo "secrets/$1: there already"
    return
  fi
  printf '%s' "$2" > "secrets/.$1"
  chmod 644 "secrets/.$1"
  mv "secrets/.$1" "secrets/$1"
  echo "secrets/$1: $3"
}

keep postgres_password "$(random)" "made; PostgreSQL's, of its role aurora"
keep aurora_database_url \
  "postgresql+psycopg://aurora:$(cat secrets/postgres_password)@postgres:5432/aurora" \
  "made; the store's address with that password"
keep grafana_admin_password "$(random)" "made; Grafana's, of its user admin"
keep aurora_scheduler_api_token "$(random)" "made; of the read-only API; empty it for no API"
keep aurora_notify_secret "$(random)" "made; signs what the webhook gets"
keep aurora_notify_webhook "" "empty; write a webhook's address into it to be told"
keep aurora_notify_slack "" "empty; write the address of a Slack webhook into it to be told"
keep hf_token "" "empty; write a token of the Hugging Face hub into it for models that ask for one"
