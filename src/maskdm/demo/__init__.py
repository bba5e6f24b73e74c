"""The demo: a page and a JSON API that draw with one's own networks. `service` computes, `page` lays out, `server` serves."""

from __future__ import annotations
