#!/bin/sh
# The page's test drives a real Chromium. Install it where there is none and that is possible; say so where it is not.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then
        echo "browser for the page's test: $name"
        exit 0
    fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing chromium for the page's test"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "no Chromium: tests/integration/test_web.py will fail; install the package chromium, or set MMFT_NO_BROWSER=1"
