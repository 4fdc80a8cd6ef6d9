#!/bin/sh
# Start the MLflow server of a group: runs in PostgreSQL, artifacts through the server, a password for every user.
# mlflow.service and compose.yaml run this script; docs/tracking_server.md has the steps. It reads
#   PGHOST, PGPORT, PGUSER, PGDATABASE   where PostgreSQL is (the variables of PostgreSQL's own commands)
#   TRACKING_SECRETS     folder of the files below; default: $CREDENTIALS_DIRECTORY (systemd), else /run/secrets (compose)
#   TRACKING_ARTIFACTS   folder of the runs' files; default /var/lib/mlflow/artifacts
#   TRACKING_HOST, TRACKING_PORT, TRACKING_WORKERS   default 127.0.0.1, 5000 and 4
#   MLFLOW_SERVER_ALLOWED_HOSTS          host names of a proxy in front, e.g. mlflow.lab.org; default: loopback and private addresses
# and a secret from its variable, or else from its file in the folder:
#   PGPASSWORD                       database_password    of PGUSER
#   MLFLOW_FLASK_SERVER_SECRET_KEY   flask_secret_key     signs the pages of the browser
#   MLFLOW_AUTH_ADMIN_PASSWORD       admin_password       of the user admin, who is created at the first start; 12 characters or more
set -eu
here=$(cd "$(dirname "$0")" && pwd)
secrets=${TRACKING_SECRETS:-${CREDENTIALS_DIRECTORY:-/run/secrets}}

secret() { # NAME VALUE: print VALUE, or else the content of file NAME
    if [ -n "$2" ]; then printf %s "$2"; return; fi
    if ! [ -s "$secrets/$1" ] || ! [ -r "$secrets/$1" ]; then
        echo "serve.sh: error: no secret in $secrets/$1 (missing, empty or not readable); write it there, or set its variable" >&2
        return 2
    fi
    cat "$secrets/$1"
}

PGPASSWORD=$(secret database_password "${PGPASSWORD:-}")
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret flask_secret_key "${MLFLOW_FLASK_SERVER_SECRET_KEY:-}")
MLFLOW_AUTH_ADMIN_PASSWORD=$(secret admin_password "${MLFLOW_AUTH_ADMIN_PASSWORD:-}")
MLFLOW_AUTH_CONFIG_PATH=${MLFLOW_AUTH_CONFIG_PATH:-$here/basic_auth.ini}
# Jobs of MLflow (scorers of language models) need four more processes, and no run of yaware uses them.
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
MLFLOW_DISABLE_TELEMETRY=true
export PGPASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_AUTH_CONFIG_PATH
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION MLFLOW_DISABLE_TELEMETRY

# The address of the database has no password, which `ps` would show.
exec mlflow server --app-name basic-auth --backend-store-uri postgresql+psycopg2:// \
    --serve-artifacts --artifacts-destination "${TRACKING_ARTIFACTS:-/var/lib/mlflow/artifacts}" \
    --host "${TRACKING_HOST:-127.0.0.1}" --port "${TRACKING_PORT:-5000}" --workers "${TRACKING_WORKERS:-4}"
