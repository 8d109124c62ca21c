#!/usr/bin/env bash
# Prints the changelog's section of a version, for its release.
#
#   tools/release_notes.sh 0.1.0
#
# Fails if the package has another version or the changelog has no such section.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?usage: tools/release_notes.sh VERSION}
own=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' plt_megatron/__init__.py)
if [ "$version" != "$own" ]; then
    echo "error: plt_megatron/__init__.py has version $own, not $version: change one, or the tag" >&2
    exit 2
fi
awk -v heading="## $version " '
    index($0 " ", heading) == 1 { found = 1; next }
    found && /^## / { exit }
    found { print }
    END { exit !found }' CHANGELOG.md || {
    echo "error: CHANGELOG.md has no section '## $version': rename 'Unreleased'" >&2
    exit 2
}
