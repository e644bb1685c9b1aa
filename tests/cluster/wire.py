"""A wire with delay and loss between two network interfaces, for kernels whose tc has no netem.

    wire.py FIRST SECOND DELAY_SECONDS LOSS

A frame that arrives at one interface leaves by the other so much later or, with probability LOSS, never. Runs
where both interfaces are, until it is killed. Frames have to be whole: senders with offloads switched off.
"""

import heapq
import itertools
import random
import select
import socket
import sys
import time

_ALL_PROTOCOLS = 3  # linux/if_ether.h: ETH_P_ALL
_RECEIVE_BUFFER = 33  # asm/socket.h: SO_RCVBUFFORCE


def end_of(interface: str) -> socket.socket:
    """Return a socket that receives and sends whole frames of an interface."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    end.bind((interface, 0))
    end.setsockopt(socket.SOL_SOCKET, _RECEIVE_BUFFER, 16 << 20)
    end.setblocking(False)
    return end


def carry(first: socket.socket, second: socket.socket, delay_seconds: float, loss: float) -> None:
    """Carry frames both ways for ever, in order."""
    other, lost = {first: second, second: first}, random.Random(0)
    underway: list[tuple[float, int, socket.socket, bytes]] = []
    number = itertools.count()
    while True:
        while underway and underway[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(underway)
            try:
                end.send(frame)
            except OSError:  # no room, or the interface is down: a wire drops it
                continue
        wait = max(0.0, underway[0][0] - time.monotonic()) if underway else None
        for end in select.select([first, second], [], [], wait)[0]:
            frame, address = end.recvfrom(65536)
            if address[2] != socket.PACKET_OUTGOING and lost.random() >= loss:
                due = time.monotonic() + delay_seconds
                heapq.heappush(underway, (due, next(number), other[end], frame))


if __name__ == "__main__":
    carry(end_of(sys.argv[1]), end_of(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
