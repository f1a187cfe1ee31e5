"""The graph of the workflow's rules as SVG, drawn without Graphviz."""

import re
import subprocess
import sys
from pathlib import Path

from randopt.errors import UserError
from randopt.files import write_text_atomic

BOX = (168, 44)  # width and height of a rule's box, px
GAP = (36, 46)  # between boxes of a layer and between layers, px


def write_dag(output: Path, configfile: Path | None) -> None:
    """Ask Snakemake for the rule graph and the job counts of a full run, and draw them.

    Raises UserError with Snakemake's own message when the dry run fails.
    """
    extra = ["--configfile", str(configfile)] if configfile else []
    graph = _snakemake("--rulegraph", *extra)
    counts = _job_counts(_snakemake("-n", "--forceall", "--quiet", "rules", *extra))
    write_text_atomic(output, draw(*parse_rulegraph(graph), counts))


def parse_rulegraph(dot: str) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Nodes (id -> rule name) and edges (from, to) of Snakemake's rule graph in DOT.

    `all` asks for every table; of its edges only those from rules that nothing else reads are kept.
    """
    nodes = dict(re.findall(r'^\s*(\d+)\[label = "([^"\\]+)', dot, flags=re.M))
    edges = re.findall(r"^\s*(\d+) -> (\d+)", dot, flags=re.M)
    read = {a for a, b in edges if nodes[b] != "all"}
    return nodes, [(a, b) for a, b in edges if nodes[b] != "all" or a not in read]


def layers(nodes: dict[str, str], edges: list[tuple[str, str]]) -> list[list[str]]:
    """Node ids by longest distance from a source, sorted by rule name inside a layer.

    The rule graph of a workflow whose rule feeds itself through others has a cycle (generate →
    select → generate); an edge that would close one is left out of the ranking.
    """
    rank = dict.fromkeys(nodes, 0)
    parents = {node: [a for a, b in edges if b == node and a != b] for node in nodes}

    def depth(node: str, path: frozenset[str]) -> int:
        above = [depth(p, path | {node}) for p in parents[node] if p not in path]
        return 1 + max(above, default=-1)

    for node in nodes:
        rank[node] = depth(node, frozenset({node}))
    found: list[list[str]] = [[] for _ in range(max(rank.values(), default=0) + 1)]
    for node in sorted(nodes, key=lambda n: nodes[n]):
        found[rank[node]].append(node)
    return [layer for layer in found if layer]


def draw(nodes: dict[str, str], edges: list[tuple[str, str]], counts: dict[str, int]) -> str:
    """The graph as an SVG document, sources at the top."""
    rows = layers(nodes, edges)
    width = max(len(row) for row in rows) * (BOX[0] + GAP[0]) + GAP[0]
    height = len(rows) * (BOX[1] + GAP[1]) + GAP[1]
    place: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(rows):
        span = len(row) * (BOX[0] + GAP[0]) - GAP[0]
        for index, node in enumerate(row):
            place[node] = ((width - span) / 2 + index * (BOX[0] + GAP[0]), GAP[1] + level * (BOX[1] + GAP[1]))
    body = [_edge(place[a], place[b]) for a, b in edges if a != b]
    for node, (x, y) in place.items():
        name = nodes[node]
        fill = "#d55e00" if name == "generate" else "#0072b2"
        jobs = f"{counts[name]} job{'s' if counts[name] != 1 else ''}" if name in counts else ""
        body.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" fill="{fill}"/>'
            f'<text x="{x + BOX[0] / 2:.0f}" y="{y + 19:.0f}" class="n">{name}</text>'
            f'<text x="{x + BOX[0] / 2:.0f}" y="{y + 35:.0f}" class="c">{jobs}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" text-anchor="middle">\n'
        "<style>.n{fill:#fff;font-size:14px;font-weight:bold}.c{fill:#fff;font-size:11px}"
        "path{fill:none;stroke:#888;stroke-width:1.4}</style>\n"
        '<rect width="100%" height="100%" fill="#fff"/>\n'
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8" style="fill:#888"/></marker></defs>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x0, y0 = start[0] + BOX[0] / 2, start[1] + BOX[1]
    x1, y1 = end[0] + BOX[0] / 2, end[1]
    if y1 < y0:  # back to an earlier layer: round the side
        side = max(start[0], end[0]) + BOX[0] + GAP[0] * 0.8
        x0, y0 = start[0] + BOX[0], start[1] + BOX[1] / 2
        x1, y1 = end[0] + BOX[0], end[1] + BOX[1] / 2
        control = f"{side:.0f} {y0:.0f} {side:.0f} {y1:.0f}"
    else:
        middle = (y0 + y1) / 2
        control = f"{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f}"
    return f'<path d="M{x0:.0f} {y0:.0f} C{control} {x1:.0f} {y1:.0f}" marker-end="url(#a)"/>'


def _job_counts(text: str) -> dict[str, int]:
    """Jobs per rule from the table of a dry run."""
    return {name: int(count) for name, count in re.findall(r"^(\w+)\s+(\d+)\s*$", text, flags=re.M)}


def _snakemake(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"snakemake {' '.join(arguments)} failed:\n{done.stderr.strip()}")
    return done.stdout
