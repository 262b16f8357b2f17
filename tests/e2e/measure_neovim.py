"""How long a person waits for ghost text in Neovim: albor, or llama.vim over llama-server.

Keys come at a fixed pace into a real Neovim; inside it a timer looks each millisecond at the
extmarks that draw ghost text. Two times are kept of a key, from its input: to the first ghost text
for the new text, and to the ghost text that still stands when the next key comes. Neovim is
headless: drawing on a screen is not part of the times.

    python -m tests.e2e.measure_neovim albor
    python -m tests.e2e.measure_neovim albor --ghost builtin
    python -m tests.e2e.measure_neovim llama.vim --plugin FOLDER --llama-server PROGRAM
    python -m tests.e2e.measure_neovim start-up

Keys and file are those of measure_vscode. ALBOR_NVIM names the Neovim (tests/e2e/get_editors.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.e2e.measure_vscode import START, TYPED, llama_server
from tests.e2e.neovim import Neovim, until
from tests.e2e.stack import ROOT, environment

PLUGIN: Final = ROOT / "editors" / "nvim"
NUM_STARTS: Final = 20
SETTLE_S: Final = 3.0
# What is typed brings its own indentation.
PLAIN: Final = """\
vim.o.swapfile, vim.o.autoindent = false, false
vim.cmd('filetype plugin on | filetype indent off')
"""
DRIVER: Final = """\
local keys, gap_ms, names, output = ...
local gap = gap_ms * 1e6
local typed = io.open(keys):read('*a')
local api, now = vim.api, vim.uv.hrtime
local times = {}
local index, pressed, tick, changed, current, first, last

local function ghost()
  local texts = {}
  for name, id in pairs(api.nvim_get_namespaces()) do
    if name:find(names) then
      for _, mark in ipairs(api.nvim_buf_get_extmarks(0, id, 0, -1, { details = true })) do
        texts[#texts + 1] = mark[2] .. ':' .. mark[3]
        for _, part in ipairs(mark[4].virt_text or {}) do texts[#texts + 1] = part[1] end
        for _, line in ipairs(mark[4].virt_lines or {}) do texts[#texts + 1] = line[1][1] end
      end
    end
  end
  return table.concat(texts, '\\n')
end

local function press()
  tick, changed, current, first, last = api.nvim_buf_get_changedtick(0), false, '', -1, -1
  local key = typed:sub(index, index)
  pressed = now()
  api.nvim_input(key == '\\n' and '<CR>' or key == '<' and '<LT>' or key)
end

local timer = vim.uv.new_timer()
local function look()
  if index > #typed then return end
  local time = now()
  changed = changed or api.nvim_buf_get_changedtick(0) ~= tick
  if changed then
    local text = ghost()
    if text ~= current then
      current = text
      last = text ~= '' and (time - pressed) / 1e6 or -1
      if first < 0 then first = last end
    end
  end
  if time - pressed < gap then return end
  times[index] = { first = first, last = last }
  index = index + 1
  if index <= #typed then return press() end
  timer:stop()
  local file = io.open(output .. '.part', 'w')
  file:write(vim.json.encode(times))
  file:close()
  os.rename(output .. '.part', output)
end

index = 1
press()
timer:start(1, 1, vim.schedule_wrap(look))
"""


def typing(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Type into one Neovim: how many keys had ghost text, and after how many milliseconds."""
    file = home / "project" / "shop.py"
    file.parent.mkdir()
    file.write_text(START)
    keys, driver, output = home / "keys", home / "driver.lua", home / "times.json"
    keys.write_text(TYPED[: options.keys])
    driver.write_text(DRIVER)
    is_ours = options.what == "albor"
    with ExitStack() as stack:
        if is_ours:
            names = "inline_completion"
            configuration = (
                f"vim.opt.runtimepath:prepend('{PLUGIN}')\n"
                f"require('albor').setup({{ ghost = '{options.ghost}' }})\n"
            )
        else:
            names = "^vt_fim"
            more = ["--spm-infill"] if options.suffix_first else []
            port = stack.enter_context(llama_server(options.llama_server, *more))
            configuration = (
                "vim.g.llama_config = { show_info = 0, "
                f"endpoint_fim = 'http://127.0.0.1:{port}/infill' }}\n"
                f"vim.opt.runtimepath:prepend('{options.plugin}')\n"
            )
        window = Neovim(options.nvim, home, file, PLAIN + configuration)
        stack.callback(window.close)
        if is_ours:
            until(lambda: window.lua("return require('albor').status.state") == "ready", 60)
        time.sleep(SETTLE_S)
        window.type("GA")
        time.sleep(SETTLE_S)
        window.lua(
            f"loadfile('{driver}')('{keys}', {options.gap_ms}, '{names}', '{output}') return 1"
        )
        until(output.exists, 60 + options.keys * options.gap_ms / 1000)
        times = json.loads(output.read_text())
        text = window.text()
    if text != (START + TYPED[: options.keys]).removesuffix("\n"):
        raise SystemExit(f"the figures mean nothing, for the text is not what was typed: {text}")
    result = {"keys": len(times)}
    for name in ("first", "last"):
        shown = sorted(time[name] for time in times if time[name] >= 0)
        result |= {
            f"{name}_shown": len(shown),
            f"{name}_p50_ms": round(statistics.median(shown), 1) if shown else None,
            f"{name}_p95_ms": round(shown[int(0.95 * (len(shown) - 1))], 1) if shown else None,
            f"{name}_within_50_ms": sum(time <= 50 for time in shown),
            f"{name}_within_100_ms": sum(time <= 100 for time in shown),
        }
    return result | {"times": times}


def start_up(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Median milliseconds until Neovim has started, with and without the plugin, in turns."""
    file = home / "shop.py"
    file.write_text(START)
    without, with_plugin = home / "without.lua", home / "with.lua"
    without.write_text("")
    with_plugin.write_text(f"vim.opt.runtimepath:prepend('{PLUGIN}')\nrequire('albor').setup()\n")
    times: dict[str, list[float]] = {"without": [], "with": []}
    log = home / "start.log"
    for _ in range(NUM_STARTS):
        for configuration in (without, with_plugin):
            log.unlink(missing_ok=True)
            subprocess.run(
                [options.nvim, "--headless", "-u", str(configuration), "--startuptime", str(log),
                 str(file), "-c", "qa!"],
                env=environment(home), check=True, capture_output=True,
            )  # fmt: skip
            started = [line for line in log.read_text().splitlines() if "NVIM STARTED" in line]
            times[configuration.stem].append(float(started[-1].split()[0]))
    medians = {f"{name}_ms": round(statistics.median(all_), 1) for name, all_ in times.items()}
    return medians | {"cost_ms": round(medians["with_ms"] - medians["without_ms"], 1)}


def main() -> None:
    """Take one measurement and print its figures; the single times go where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("albor", "llama.vim", "start-up"))
    parser.add_argument("--ghost", choices=("own", "builtin"), default="own")
    parser.add_argument("--keys", type=int, default=200)
    parser.add_argument("--gap-ms", type=float, default=400.0, help="from one key to the next")
    parser.add_argument("--nvim", default=os.environ.get("ALBOR_NVIM", "nvim"))
    parser.add_argument("--plugin", help="folder of llama.vim")
    parser.add_argument("--llama-server", help="its server's program")
    parser.add_argument("--suffix-first", action="store_true", help="--spm-infill for llama-server")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="albor-measure-", ignore_cleanup_errors=True) as home:
        result = (start_up if options.what == "start-up" else typing)(options, Path(home))
    if options.json is not None:
        options.json.write_text(json.dumps(result))
    result.pop("times", None)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
