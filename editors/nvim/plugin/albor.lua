-- Without a call of setup() in the person's own configuration the defaults apply.
if vim.g.loaded_albor then
  return
end
vim.g.loaded_albor = true
if vim.fn.has('nvim-0.10') == 0 then
  return
end

local function begin()
  local albor = require('albor')
  if not albor.config then
    albor.setup()
  end
end

-- A plugin manager may call setup() right after this file: it goes first.
if vim.v.vim_did_enter == 1 then
  vim.schedule(begin)
else
  vim.api.nvim_create_autocmd('VimEnter', { once = true, callback = begin })
end

vim.api.nvim_create_user_command('Albor', function(call)
  begin()
  require('albor').command(call.args)
end, {
  nargs = '?',
  desc = 'albor: status, start, stop, toggle, explain, stats, log',
  complete = function(typed)
    return vim.tbl_filter(function(name)
      return vim.startswith(name, typed)
    end, require('albor').names())
  end,
})
