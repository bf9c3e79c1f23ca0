"""The style sheet of report.html: one column, light and dark, narrow and wide, and on paper."""

STYLE = """
:root { --ink: #1d232b; --pale: #5d6875; --line: #d9dee4; --page: #ffffff; --card: #f5f7f9; --accent: #1f6feb;
  --good: #1a7f37; --bad: #b42318; --trained: #fff1b8; --raw: #9db8e8; --warm: #b35900; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --pale: #9aa5b1; --line: #333b45; --page: #14181d;
  --card: #1d232b; --accent: #6ea8fe; --good: #57c177; --bad: #ff8577; --trained: #574a12; --raw: #3c5a8c;
  --warm: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 24px 16px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; padding-bottom: 4px; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 8px; }
p { margin: 8px 0; } small, .pale { color: var(--pale); }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; overflow-x: auto;
  white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin: 20px 0; }
@media (max-width: 560px) { .cards { grid-template-columns: repeat(2, 1fr); } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.12rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.93rem; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--pale); font-weight: 600; }
td.number, th.number { text-align: right; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
figcaption { font-weight: 600; font-size: 0.9rem; margin-bottom: 4px; }
svg, img { width: 100%; height: auto; display: block; }
.pictures { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; }
.picture { max-width: 100%; width: fit-content; } .picture img { width: auto; max-width: 100%; background: #fff; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .axis { fill: var(--pale); font-size: 12px; }
svg polyline { fill: none; stroke: var(--accent); stroke-width: 2; }
svg polyline.raw { stroke: var(--raw); stroke-width: 1; }
svg polyline.dots, svg circle.dots { stroke: var(--good); } svg circle.dots { fill: var(--good); }
svg .base { stroke: var(--warm); } svg .adapter { stroke: var(--accent); } svg circle.base { fill: var(--card); }
svg circle { stroke-width: 2; } svg circle.adapter { fill: var(--accent); } svg .span { stroke-width: 1; }
svg polyline.base, svg polyline.ideal { stroke-dasharray: 2 4; }
svg polyline.ideal { stroke: var(--pale); stroke-width: 1; }
.reliability { max-width: 520px; }
h4 { font-size: 0.93rem; margin: 20px 0 4px; }
table.heat { width: auto; font-size: 0.8rem; }
.heat td { text-align: center; padding: 2px 4px; min-width: 26px; border: 1px solid var(--line); }
.heat td.own { outline: 2px solid var(--accent); outline-offset: -2px; } .heat td[data-zero] { color: var(--pale); }
.heat thead td { border: 0; }
.heat th { font-weight: 400; color: var(--ink); padding: 2px 6px; }
.heat tbody th { position: sticky; left: 0; background: var(--page); max-width: 13rem; overflow-wrap: break-word; }
.heat thead th { vertical-align: bottom; padding: 6px 2px; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 13rem; }
@media (max-width: 560px) { .heat tbody th { max-width: 8rem; min-width: 8rem; } }
.legend { font-size: 0.8rem; margin: 4px 0 0; } .key { margin-right: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; background: var(--accent); }
.key.raw::before { background: var(--raw); } .key.dots::before { background: var(--good); }
.key.base::before { background: var(--warm); } .key.ideal::before { background: var(--pale); height: 1px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.warning { border-left: 4px solid var(--bad); padding: 4px 12px; background: var(--card); margin: 8px 0; }
.bar { display: inline-block; height: 10px; background: var(--accent); border-radius: 2px; min-width: 1px; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; } .sample mark { background: var(--trained); color: inherit; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 12px; }
details summary { cursor: pointer; color: var(--accent); margin: 8px 0; }
@page { margin: 15mm 14mm; }
@media print {
  :root { --ink: #000; --pale: #444; --line: #bbb; --page: #fff; --card: #fff; --accent: #1f6feb; --good: #1a7f37;
    --bad: #b42318; --trained: #fff1b8; --raw: #9db8e8; --warm: #b35900; }
  body { max-width: none; padding: 0; font-size: 10pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h1, h2, h3, summary { break-after: avoid; } h2 { margin-top: 24px; }
  figure, .card, tr, .warning { break-inside: avoid; } thead { display: table-header-group; }
  .charts, .pair { grid-template-columns: 1fr 1fr; } .cards { grid-template-columns: repeat(3, 1fr); }
  .scroll { overflow: visible; } .heat tbody th { position: static; }
  table { font-size: 9pt; } th, td { padding: 3px 6px; } pre { font-size: 8pt; }
  pre.config { columns: 3; font-size: 6.5pt; }
  td.number, td code { white-space: normal; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; height: auto; } }
"""
