"""How the page looks: fonts of the reader's own machine, quiet colours, light or dark as the reader's system is."""

from __future__ import annotations

import gradio as gr

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

HEAD = '<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'

CSS = """
.head { align-items: center; }
.head h1 { font-size: 1.4rem; font-weight: 600; margin: 0; }
p[role=status] { margin: 0; overflow-wrap: anywhere; line-height: 1.45; }
p.wrong { color: var(--error-text-color); border-left: 3px solid var(--error-border-color); padding-left: .6em; }
.tiles .grid-container { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)) !important; grid-auto-rows: auto !important; }
.tiles .grid-wrap { min-height: 0 !important; max-height: none !important; }
.tiles:has(label) .grid-wrap { padding-top: 2rem; }
.tiles .thumbnail-item { aspect-ratio: 1; height: auto !important; }
.large .grid-container, .tiles:not(.crisp) .grid-container { grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)) !important; }
@media (max-width: 500px) { .tab-container button { padding: 0 .45rem !important; font-size: .9rem; } }
.crisp img { image-rendering: pixelated; }
#editor { min-height: 360px; }
"""


def theme() -> gr.themes.Base:
    """Gradio's own, with no font from anywhere else."""
    fonts = [[gr.themes.Font(name) for name in names] for names in (SANS, MONO)]
    return gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts[0], font_mono=fonts[1])
