"""A static HTML page, light or dark as its reader's browser is."""

import base64
import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import pandas as pd

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --faint: #666; --line: #ddd; --page: #fff; --band: #f5f5f5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --faint: #999; --line: #3a3a3a; --page: #161616; --band: #1f1f1f }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 76rem; padding: 0 1.2rem }
nav { color: var(--faint); margin-bottom: 2rem } nav a { color: inherit; margin-right: 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.4rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--faint); font-weight: 600; white-space: nowrap } th.text, td.text { text-align: left }
tbody tr:nth-child(even) { background: var(--band) }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; max-width: min(100%, 35rem) }
figure img { max-width: 100%; border-radius: 4px; background: #fff }
.relief { display: inline-block; width: min(100%, 35rem); height: 460px; margin: 0 1rem 1rem 0; vertical-align: top;
          background: #fff; border-radius: 4px; overflow: hidden } .note { color: var(--faint); font-size: 13px }
figcaption, summary { color: var(--faint); font-size: 13px } summary { cursor: pointer }
pre { background: var(--band); padding: 1rem; overflow-x: auto; font-size: 12.5px }
"""


_DRAW_RELIEFS = """
const packed = Uint8Array.from(atob("PLOTLY"), c => c.charCodeAt(0));
new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text().then(program => {
  document.head.append(Object.assign(document.createElement("script"), {textContent: program}));
  const config = {responsive: true, displaylogo: false};
  const inSight = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => isIntersecting
    ? Plotly.newPlot(target, {...JSON.parse(target.dataset.figure), config}) : Plotly.purge(target)));
  document.querySelectorAll(".relief").forEach(element => inSight.observe(element));
});
"""
# Compressed the program takes 2 MB, not 5; and browsers keep some ten such drawings at most, hence those in sight.


@dataclass(frozen=True)
class Section:
    """A heading and what is under it, as HTML."""

    title: str
    content: str

    @property
    def anchor(self) -> str:
        """Its place on the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def page(title: str, sections: Iterable[Section], *, plotly: str = "") -> str:
    """The whole page.

    Args:
        title: of the page.
        sections: from top to bottom.
        plotly: the program that draws :func:`relief`, where there is one.
    """
    shown = [*sections]
    links = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in shown)
    body = "\n".join(f'<h2 id="{s.anchor}">{escape(s.title)}</h2>\n{s.content}' for s in shown)
    script = f"<script>{_DRAW_RELIEFS.replace('PLOTLY', _packed(plotly))}</script>\n" if plotly else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{escape(title)}</h1>\n<nav>{links}</nav>\n{body}\n{script}</body>\n</html>\n"
    )


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def table(rows: pd.DataFrame) -> str:
    """A table that scrolls where it is wider than the page; four digits, texts to the left."""
    texts = [rows.iloc[:, i].map(lambda v: isinstance(v, str)).any() for i in range(rows.shape[1])]
    kinds = [' class="text"' if is_text else "" for is_text in texts]
    head = "".join(f"<th{kind}>{escape(str(name))}</th>" for name, kind in zip(rows.columns, kinds, strict=True))
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows.itertuples(index=False, name=None))
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td>{'' if pd.isna(value) else format(value, '.4g')}</td>"
    if isinstance(value, str):
        return f'<td class="text">{escape(value)}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def image(caption: str, *, content: bytes | None = None, source: str = "") -> str:
    """A PNG picture: its content as part of the page, or where it is."""
    if content is not None:
        source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    text = escape(caption, quote=True)
    src = escape(source, quote=True)
    return f'<figure><img loading="lazy" alt="{text}" src="{src}"><figcaption>{text}</figcaption></figure>\n'


def relief(figure: str) -> str:
    """A figure of plotly, in JSON, that is drawn while it is in sight."""
    return f'<div class="relief" data-figure="{escape(figure, quote=True)}"></div>\n'


def note(text: str) -> str:
    """A remark."""
    return f'<p class="note">{escape(text)}</p>\n'


def details(summary: str, content: str) -> str:
    """Content that is folded away."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"
