"""From a key to ghost text inside Neovim: albor both ways, and llama.vim, in the same editor.

    python -m tests.e2e.measure_neovim --client own --gap-ms 600

A key's time ends where the ghost text is first what it still is when the next key comes; keys
without ghost text then are counted apart. Neovim is headless: drawing is not part of the time.
llama.vim asks the llama-server of --llama-url; give that server the same model, and
--spm-infill where the model wants the suffix first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from tests.e2e.neovim import Neovim, until
from tests.e2e.stack import environment

PLUGIN = Path(__file__).resolve().parents[2] / "editors" / "nvim"
FILE = '''"""Small statistics."""

import math


def mean(values):
    """The sum, divided by how many there are."""
    return sum(values) / len(values)


'''
TYPED = """def variance(values):
    center = mean(values)
    return sum((value - center) ** 2 for value in values) / len(values)


def deviation(values):
    return math.sqrt(variance(values))


def largest(values):
    best = values[0]
    for value in values:
        if value > best:
            best = value
    return best
"""
MAX_KEYS = 200
DRIVER = """
local source, gap, names, output = ...
local typed = io.open(source):read('a')
local uv, api = vim.uv, vim.api
local keys = {}
local function ghost()
  local texts = {}
  for name, id in pairs(api.nvim_get_namespaces()) do
    if name:find(names) then
      for _, mark in ipairs(api.nvim_buf_get_extmarks(0, id, 0, -1, {details = true})) do
        texts[#texts + 1] = mark[2] .. ':' .. mark[3]
        for _, part in ipairs(mark[4].virt_text or {}) do texts[#texts + 1] = part[1] end
        for _, line in ipairs(mark[4].virt_lines or {}) do texts[#texts + 1] = line[1][1] end
      end
    end
  end
  return table.concat(texts, '\\n')
end
local index, started, current, since, arrived = 0, 0, '', 0, false
local timer = uv.new_timer()
local function step()
  local now = uv.hrtime()
  if index > 0 then
    local tick = api.nvim_buf_get_changedtick(0)
    if tick ~= arrived.tick then
      local text = ghost()
      if text ~= current or not arrived.seen then
        current, since = text, now
      end
      arrived.seen = true
    end
    if now - started < gap * 1e6 then return end
    keys[index] = {current == '' and -1 or (since - started) / 1e6}
  end
  index = index + 1
  if index > #typed then
    timer:stop()
    local file = io.open(output .. '.part', 'w')
    file:write(vim.json.encode(keys))
    file:close()
    os.rename(output .. '.part', output)
    return
  end
  arrived = {tick = api.nvim_buf_get_changedtick(0), seen = false}
  started = uv.hrtime()
  local key = typed:sub(index, index)
  api.nvim_input(key == '\\n' and '<CR>' or key == '<' and '<LT>' or key)
end
timer:start(0, 1, vim.schedule_wrap(step))
"""


def main() -> None:
    """Measure one client and print a line of figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--client", choices=("own", "builtin", "llama.vim"), default="own")
    parser.add_argument("--gap-ms", type=float, default=600.0)
    parser.add_argument("--keys", type=int, default=MAX_KEYS)
    parser.add_argument("--nvim", default=os.environ.get("ALBOR_NVIM", "nvim"))
    parser.add_argument("--llama-vim", type=Path, help="folder of the plugin")
    parser.add_argument("--llama-url", default="http://127.0.0.1:8012/infill")
    parser.add_argument("--startup", action="store_true", help="measure the start of Neovim only")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="albor-measure-"))
    try:
        result = _start_up(options, home) if options.startup else _typing(options, home)
        print(json.dumps(result))
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _typing(options: argparse.Namespace, home: Path) -> dict[str, object]:
    project = home / "project"
    project.mkdir()
    (project / "numbers.py").write_text(FILE)
    output = home / "times.json"
    # What is typed has its own indentation.
    plain = (
        "vim.cmd('filetype plugin on | filetype indent off') "
        "vim.o.swapfile, vim.o.autoindent = false, false\n"
    )
    if options.client == "llama.vim":
        configuration = (
            f"{plain}vim.g.llama_config = {{ endpoint = '{options.llama_url}', "
            "show_info = false }\n"
            f"vim.opt.runtimepath:prepend('{options.llama_vim}')\n"
        )
        names = "vt_fim"
    else:
        configuration = (
            f"{plain}vim.opt.runtimepath:prepend('{PLUGIN}')\n"
            f"require('albor').setup({{ ghost = '{options.client}' }})\n"
        )
        names = "inline_completion"
    driver = home / "driver.lua"
    driver.write_text(DRIVER)
    window = Neovim(options.nvim, home, project / "numbers.py", configuration)
    try:
        if options.client != "llama.vim":
            state = "return require('albor').status.state"
            until(lambda: window.lua(state) == "ready", 60)
        time.sleep(2)
        window.type("GA")
        time.sleep(2)
        source = home / "typed.txt"
        source.write_text(TYPED[: options.keys])
        window.lua(
            f"loadfile('{driver}')('{source}', {options.gap_ms}, '{names}', '{output}') return 1"
        )
        until(output.exists, 60 + options.keys * options.gap_ms / 1000)
        times = [each[0] for each in json.loads(output.read_text())]
        text = window.text()
    finally:
        window.close()
    if TYPED[: options.keys].strip() not in text:
        raise SystemExit("what was typed is not what stands there: the figures mean nothing")
    shown = sorted(each for each in times if each >= 0)
    return {
        "client": options.client,
        "gap_ms": options.gap_ms,
        "keys": len(times),
        "with_ghost": len(shown),
        "p50_ms": round(statistics.median(shown), 1) if shown else None,
        "p95_ms": round(shown[int(0.95 * (len(shown) - 1))], 1) if shown else None,
    }


def _start_up(options: argparse.Namespace, home: Path) -> dict[str, object]:
    file = home / "numbers.py"
    file.write_text(FILE)
    plain, with_plugin = home / "plain.lua", home / "plugin.lua"
    # Else Neovim's own Python support asks every Python on the PATH, for a second or two.
    quick = "vim.g.loaded_python3_provider = 0\n"
    plain.write_text(quick)
    with_plugin.write_text(
        f"{quick}vim.opt.runtimepath:prepend('{PLUGIN}')\nrequire('albor').setup()\n"
    )
    times: dict[Path, list[float]] = {plain: [], with_plugin: []}
    for _ in range(15):
        for config, values in times.items():
            log = home / "start.log"
            log.unlink(missing_ok=True)
            subprocess.run(
                [options.nvim, "--headless", "-u", str(config), "--startuptime", str(log),
                 str(file), "-c", "qa!"],
                env=environment(home), check=True, capture_output=True,
            )  # fmt: skip
            started = [line for line in log.read_text().splitlines() if "NVIM STARTED" in line]
            values.append(float(started[-1].split()[0]))
    medians = {path.stem: round(statistics.median(values), 1) for path, values in times.items()}
    return medians | {"cost_ms": round(medians["plugin"] - medians["plain"], 1)}


if __name__ == "__main__":
    main()
