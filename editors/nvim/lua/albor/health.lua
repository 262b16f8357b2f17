-- :checkhealth albor

local M = {}

local function program(name)
  local path = vim.fn.exepath(name)
  return path ~= '' and path or nil
end

function M.check()
  local health, albor = vim.health, require('albor')
  if not albor.config then
    albor.setup()
  end
  health.start('albor')
  if vim.fn.has('nvim-0.10') == 0 then
    health.error('Neovim is older than 0.10', 'install Neovim 0.10 or newer')
    return
  end
  local way = albor.uses_builtin() and 'vim.lsp.inline_completion' or "the plugin's own"
  health.ok(('Neovim %s; ghost text: %s'):format(tostring(vim.version()), way))
  if albor.config.ghost == 'builtin' and not vim.lsp.inline_completion then
    health.warn("ghost is 'builtin', which Neovim has from 0.12 on", "set ghost = 'auto'")
  end

  local command = albor.config.cmd[1]
  local path = program(command)
  if path then
    health.ok('language server: ' .. path)
  else
    health.error(command .. ' is not on the PATH', { 'pipx install albor', 'or set cmd in setup()' })
  end

  local wanted, why = albor.wants(0)
  if wanted then
    health.ok('this buffer gets suggestions')
  else
    health.info('no suggestions in this buffer: ' .. why)
  end
  local client = albor.client()
  if not client then
    health.info('the language server is not running: it starts with the first file')
    return
  end
  local summary = albor.summary()
  if albor.status.state == 'ready' then
    health.ok(summary)
  elseif albor.status.state == 'offline' or albor.status.state == 'error' then
    health.error(summary, 'see :Albor log')
  else
    health.info(summary)
  end
  for _, key in pairs(albor.config.keys) do
    local now = key and vim.fn.maparg(key, 'i', false, true) or {}
    if key and not vim.startswith(now.desc or '', 'albor') then
      health.info(('%s is mapped by another plugin: %s'):format(key, now.desc or now.rhs or 'it'))
    end
  end
end

return M
