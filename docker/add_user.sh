#!/usr/bin/env bash
# Makes a user and a group of these numbers, with a home; root's numbers and those that are there already stay.
#
# Usage: bash docker/add_user.sh UID GID
set -euo pipefail

uid=$1 gid=$2
((uid != 0)) || exit 0
getent group "$gid" >/dev/null || groupadd --gid "$gid" kit
getent passwd "$uid" >/dev/null || useradd --uid "$uid" --gid "$gid" --create-home --shell /bin/bash kit
