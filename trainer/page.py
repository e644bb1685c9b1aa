"""The page of a report: HTML and CSS in one file without network, for light and dark screens and for paper.

Only what it is given as ``Html`` is taken for HTML; every other text is escaped.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def page(
    title: str, subtitle: str, tiles: Iterable[tuple[str, str]], sections: Sequence[tuple[str, Html]]
) -> Html:
    """Return the whole document: a heading, a row of numbers, and titled sections with links to them."""
    links = "".join(f'<a href="#s{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    numbers = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in tiles
    )
    body = "".join(
        f'<section id="s{i}"><h2>{escape(name)}</h2>{content}</section>'
        for i, (name, content) in enumerate(sections)
    )
    return Html(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style></head><body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>"
        f'<nav>{links}</nav><main><div class="tiles">{numbers}</div>{body}</main></body></html>'
    )


def note(text: str) -> Html:
    """Return a paragraph that explains what is to be seen."""
    return Html(f'<p class="note">{escape(text)}</p>')


def heading(text: str) -> Html:
    """Return a heading inside a section."""
    return Html(f"<h3>{escape(text)}</h3>")


def cards(contents: Iterable[Html], kind: str = "wide") -> Html:
    """Return contents side by side as far as there is room; ``kind``: wide, small or pairs."""
    return Html(f'<div class="cards {kind}">' + "".join(f"<figure>{c}</figure>" for c in contents) + "</div>")


def table(columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> Html:
    """Return a table; numbers are aligned to the right, and have four digits after the point."""

    def cell(value: str | float) -> str:
        if isinstance(value, Html):
            return f"<td>{value}</td>"
        if isinstance(value, str):
            return f"<td>{escape(value)}</td>"
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        return f'<td class="number">{text}</td>'

    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def picture(content: bytes, kind: str, text: str, mark: str = "") -> Html:
    """Return an image held by the page itself; ``text`` is shown on hover, ``mark`` is a class of the CSS."""
    data, text = base64.b64encode(content).decode(), escape(text)
    return Html(f'<img class="{mark}" src="data:image/{kind};base64,{data}" title="{text}" alt="{text}">')


def pair(left: Html, right: Html, caption: str, detail: str) -> Html:
    """Return two images beside each other with a caption."""
    text = f"<figcaption><b>{escape(caption)}</b> {escape(detail)}</figcaption>"
    return Html(f'<div class="two">{left}{right}</div>{text}')


def strip(images: Sequence[Html]) -> Html:
    """Return a query, set apart, and the images nearest to it."""
    return Html(f'<div class="strip">{images[0]}<i></i>{"".join(images[1:])}</div>')


def preformatted(text: str) -> Html:
    """Return text as it stands."""
    return Html(f"<pre>{escape(text)}</pre>")


def folded(title: str, content: Html) -> Html:
    """Return something that opens on a click."""
    return Html(f"<details><summary>{escape(title)}</summary>{content}</details>")


_CSS = """
:root{--back:#f7f7f5;--card:#fff;--ink:#1d2126;--muted:#6b7280;--grid:#e4e4e0;--accent:#2563eb;
--good:#15803d;
--bad:#dc2626;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--back:#121316;--card:#1b1d22;--ink:#e7e8ea;--muted:#9aa1ac;
--grid:#30343b;--accent:#7aa7ff;--good:#4ade80;--bad:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:48px}
h1{font-size:34px;line-height:1.15;letter-spacing:-.02em;margin:0}
header p{color:var(--muted);margin:.4em 0 1.2em;overflow-wrap:anywhere}
nav{position:sticky;top:0;z-index:1;background:var(--back);border-bottom:1px solid var(--grid);
display:flex;gap:20px;overflow-x:auto;padding:10px max(24px,calc(50vw - 536px));font-size:14px}
nav a{color:var(--muted);text-decoration:none;white-space:nowrap}nav a:hover{color:var(--accent)}
section{margin:48px 0;scroll-margin-top:56px}
h2{font-size:22px;letter-spacing:-.01em;margin:0 0 8px}h3{font-size:16px;margin:28px 0 8px}
.note{color:var(--muted);max-width:75ch;margin:0 0 16px;font-size:15px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:28px}
.tile{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px}
.tile b{display:block;font-size:24px;line-height:1.2;letter-spacing:-.01em}
.tile span{color:var(--muted);font-size:13px;overflow-wrap:anywhere}
.cards{display:grid;gap:14px;margin:12px 0}
.cards.wide{grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr))}
.cards.small{grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr))}
.cards.pairs{grid-template-columns:repeat(auto-fill,minmax(210px,1fr))}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px;
min-width:0}
figure>svg{display:block;width:100%;height:auto}svg text{fill:currentColor;font-family:inherit!important}
figcaption{font-size:13px;color:var(--muted);margin-top:8px;overflow-wrap:anywhere}
figcaption b{color:var(--ink)}
img{border-radius:6px;image-rendering:auto}img.tiny{image-rendering:pixelated}
img.paper{background:#fff;width:100%;display:block}
.two{display:flex;gap:6px}.two img{width:50%;aspect-ratio:1;object-fit:contain;background:var(--grid)}
.strip{display:flex;gap:6px;align-items:center}
.strip img{width:0;flex:1;min-width:0;aspect-ratio:1;object-fit:contain;border:3px solid transparent;
background:var(--grid)}
.strip i{width:1px;align-self:stretch;background:var(--grid);margin:0 4px}
.strip img.same{border-color:var(--good)}.strip img.other{border-color:var(--bad)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px}
th{text-align:left;color:var(--muted);font-weight:500}
th,td{padding:7px 14px 7px 0;border-bottom:1px solid var(--grid);white-space:nowrap;vertical-align:middle}
td img{height:52px;width:52px;object-fit:contain;margin-right:4px;vertical-align:middle;
background:var(--grid)}
.small th,.small td{padding-right:0}.small td.number{text-align:right}
td.number{font-variant-numeric:tabular-nums}
pre{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px;
overflow-x:auto;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:12px 0}summary{cursor:pointer;color:var(--accent)}
@media print{nav{display:none}section{break-inside:avoid}}
"""
