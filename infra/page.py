"""The common style sheet of the HTML pages. It needs no network, and pages print well."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; margin: 2rem auto; max-width: 1080px; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p.note { color: #555; margin: .2rem 0 .8rem; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .8rem .28rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; }
.simulated { background: #fff3cd; border: 1px solid #e0c766; padding: .5rem .8rem; border-radius: 4px; }
.scroll { overflow-x: auto; }
"""
