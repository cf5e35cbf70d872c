"""The server of the measurements: how nginx is configured, in a folder of its own and nowhere else."""

from pathlib import Path

CONFIGURATION = """
user root; {process}; daemon off; {pid}error_log stderr;
events {{ worker_connections {connections}; }}
http {{
  access_log off;{http}
  client_body_temp_path {root}/body; proxy_temp_path {root}/proxy; fastcgi_temp_path {root}/fastcgi;
  uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
  server {{
    listen {port}{backlog};{server}
  }}
}}
"""

LONG_LIVED = "keepalive_requests 100000000;"  # a connection ends when its client wants it to
HELLO = 'location / { return 200 "hello world\\n"; }'
SINGLE = "master_process off"
FORKING = "worker_processes 1"


def write(
    root: Path,
    port: int,
    *,
    process: str = FORKING,
    connections: int = 1024,
    http: str = LONG_LIVED,
    server: str = HELLO,
    backlog: int = 4096,
    pid: bool = True,
) -> None:
    """Write ROOT/nginx.conf, for `nginx -p ROOT -c ROOT/nginx.conf`: what it writes stays below `root`.

    `process` is one process with or without a master; `http` and `server` are what else the blocks of that name say;
    without `pid` the file for the process id is left to the command line.
    """
    (root / "nginx.conf").write_text(
        CONFIGURATION.format(
            root=root,
            port=port,
            process=process,
            connections=connections,
            pid=f"pid {root}/nginx.pid; " if pid else "",
            http=f" {http}" if http else "",
            backlog=f" backlog={backlog}" if backlog else "",
            server=f" {server}" if server else "",
        )
    )
