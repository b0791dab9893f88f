"""One connection for as long as the file exists: a line every 20 ms, and each must come back. Prints how many did."""

import pathlib
import socket
import sys
import time

address, port, stop = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
said = 0
with socket.create_connection((address, port), timeout=5) as connection, connection.makefile("rw") as stream:
    while stop.exists():
        said += 1
        stream.write(f"{said}\n")
        stream.flush()
        heard = stream.readline()
        if heard != f"{said}\n":
            sys.exit(f"said {said}, heard {heard!r}")
        time.sleep(0.02)  # the pace of the conversation, not a wait
print(said)
