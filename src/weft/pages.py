"""Pages to look at: self-contained HTML, no network, light and dark.

    document(title, [...])      head, style and parts of a page
    tiles([(name, value)])      the numbers that decide, large
    legend({name: colour})      what the colours c0 to c7 stand for

Names and values are escaped here; parts given to `document` are HTML already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

__all__ = ["document", "legend", "tiles"]

STYLE = """
:root { color-scheme: light dark; --surface: #fcfcfb; --page: #f4f4f1; --ink: #0b0b0b; --soft: #52514e; --line: #dddcd6;
  --c0: #b9b7af; --c1: #2a78d6; --c2: #1baf7a; --c3: #eb6834; --c4: #eda100; --c5: #8d5bd1; --c6: #17528f; --c7: #c2548c;
  --bad: #c4302b; }
@media (prefers-color-scheme: dark) { :root { --surface: #1a1a19; --page: #111110; --ink: #f5f5f3;
  --soft: #b3b1a9; --line: #3a3935; --c0: #62605a; --c1: #3987e5; --c2: #199e70; --c3: #d95926; --c4: #c98500; --c5: #9b72d9;
  --c6: #7db4f3; --c7: #e07fae; --bad: #ef6b66; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 4px; } p { margin: 0 0 12px; color: var(--soft); }
section { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin: 16px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 18px 0 0; }
.tile { background: var(--surface); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; vertical-align: middle; }
tr:last-child td { border-bottom: 0; } td.n, th.n { text-align: right; }
.bar { display: flex; height: 12px; width: 200px; border-radius: 4px; overflow: hidden; background: var(--page); }
.bar i { display: block; height: 100%; min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 10px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px; }
.bad { color: var(--bad); } .mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
""" + "\n".join(f".c{n} {{ background: var(--c{n}); fill: var(--c{n}); }}" for n in range(8))


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """The page as HTML text; its title is its first heading. `style`: CSS rules after the common ones."""
    name = escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}{style}</style></head>"
        f"<body><main><h1>{name}</h1>{''.join(parts)}</main></body></html>\n"
    )


def tiles(rows: Iterable[tuple[str, str]]) -> str:
    """(what it is, its value as text) side by side."""
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in rows
    )
    return f'<div class="tiles">{cells}</div>'


def legend(colours: Mapping[str, str]) -> str:
    """Names beside their colours."""
    items = "".join(f'<span><i class="{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<div class="legend">{items}</div>'
