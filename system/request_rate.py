"""Limit how many requests a server answers for each address."""

import math
import time
from collections.abc import Callable


class RequestRate:
    """ASGI middleware that refuses requests of an address that sends or fetches more than it may.

    Args:
        app: What answers the others.
        rates: Returns how much may be sent and how much be fetched, as `limits` reads it: "60 per minute".
    """

    def __init__(self, app, rates: Callable[[], tuple[str, str]]):
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        self.app, self.rates = app, rates
        self.limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope, receive, send):
        from limits import parse
        from starlette.responses import JSONResponse, PlainTextResponse

        answer = self.app
        if scope["type"] == "http":
            fetches = scope["method"] in ("GET", "HEAD", "OPTIONS")
            direction, rate = "fetched" if fetches else "sent", parse(self.rates()[fetches])
            address = scope["client"][0]
            if not self.limiter.hit(rate, direction, address):
                reset_time = self.limiter.get_window_stats(rate, direction, address).reset_time
                seconds = max(1, math.ceil(reset_time - time.time()))
                refusal = f"Too many requests from your address, {rate.amount} a minute at most: try again in {seconds} seconds."
                headers = {"Retry-After": str(seconds)}
                if scope["path"].endswith("/upload"):  # of which Gradio's page shows the whole answer, else the detail
                    answer = PlainTextResponse(refusal, 429, headers)
                else:
                    answer = JSONResponse({"detail": refusal}, 429, headers)
        await answer(scope, receive, send)
