#!/bin/sh
# A peer for `python -m perf --peer relay=...`: two relays in the client's pod, no encryption and nothing in the server's.
here=$(dirname "$0")
relay() {
    nsenter --net="$PERF_CLIENT_NETNS" "${PYTHON:-python3}" "$here/relay.py" "$@" &
}
relay 9201 "$PERF_SERVER_IP" "$PERF_HTTP_PORT"
relay 9202 "$PERF_SERVER_IP" "$PERF_BULK_PORT"
for port in 9201 9202; do
    until nsenter --net="$PERF_CLIENT_NETNS" ss -Hltn "sport = :$port" | grep -q .; do sleep 0.05; done
done
echo "ready http=127.0.0.1:9201 bulk=127.0.0.1:9202"
trap 'kill $(jobs -p)' TERM
wait
