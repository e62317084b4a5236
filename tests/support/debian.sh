# What the builders of Debian folders share (to be sourced): the mirror, apt's settings, a last word.

die() {
    echo "$(basename "$0" .sh): $*" >&2
    exit 1
}

# The first plain Debian suite that apt is configured for: not -updates, not -security, not another vendor's.
mirror() {
    local suites='^(bookworm|trixie|forky|duke|stable|testing|unstable|sid)$' found
    found=${DEBIAN_MIRROR:-$(apt-get indextargets --no-release-info --format '$(RELEASE) $(COMPONENT) $(SITE)' \
        'Created-By: Packages' | awk -v suites="$suites" '$1 ~ suites && $2 == "main" && !n++ { print $3 }')}
    test -n "$found" || die "apt knows no Debian mirror here; name one with DEBIAN_MIRROR=ADDRESS"
    echo "$found"
}

# apt's proxy and clock settings hold for the mirror; nothing else of this machine's configuration is wanted.
apt_settings() {
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries|ForceIPv)' || true
}
