"""How the report looks."""

STYLE = """
:root { --ink: #1f2430; --quiet: #6b7280; --line: #e5e7eb; --paper: #ffffff; --ground: #f6f7f9; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
.subtitle, .quiet, figcaption { color: var(--quiet); }
.subtitle { margin: 4px 0 20px; }
.quiet { margin: 4px 0 12px; }
span.quiet { margin: 0; }
.cards { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; }
@media (max-width: 760px) { .cards { grid-template-columns: repeat(2, 1fr); } }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card .value { font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .name { color: var(--quiet); font-size: 13px; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: var(--paper); border: 1px solid var(--line); }
th, td { padding: 6px 14px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
tbody th { font-weight: 400; text-align: left; color: #374151; }
thead th { font-weight: 600; background: #fafbfc; }
td.best { font-weight: 700; color: var(--accent); }
td.quiet { margin: 0; }
table.facts { width: 100%; font-size: 13.5px; }
table.facts th { vertical-align: top; padding: 4px 12px; white-space: normal; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; padding: 4px 12px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(380px, 100%), 1fr)); gap: 16px; align-items: start; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 12px; }
.charts img { width: 100%; background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 6px; }
.figures { display: flex; flex-wrap: wrap; gap: 16px; align-items: start; }
figure { margin: 0; flex: 0 1 auto; }
figure img { max-width: 100%; border: 1px solid var(--line); border-radius: 10px; display: block; }
figcaption { font-size: 13px; margin-top: 4px; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--accent); margin-bottom: 8px; }
.warning { color: #9a3412; font-weight: 600; }
.records { font-size: 13.5px; columns: 2; overflow-wrap: anywhere; }
dt { margin-top: 12px; }
dd { margin: 4px 0 0; }
code { display: inline-block; background: #eef1f5; border-radius: 6px; padding: 4px 10px; font-size: 13.5px; overflow-wrap: anywhere; }
@media print { body { background: white; } .card, table, .charts img { break-inside: avoid; } }
"""
