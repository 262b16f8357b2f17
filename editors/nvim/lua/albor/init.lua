-- albor in Neovim: settings, the language server's life, keys and the command :Albor.

local M = {}

---@class albor.Config
local DEFAULTS = {
  cmd = { 'albor-lsp' }, -- the language server
  ghost = 'auto', -- 'builtin': vim.lsp.inline_completion (0.12); 'own': this plugin's; 'auto'
  filetypes = nil, -- list of file types; nil: all that have a name
  exclude = { 'help', 'gitcommit', 'gitrebase', 'checkhealth', 'TelescopePrompt' },
  max_bytes = 5000000, -- larger files get no suggestions
  debounce_ms = 0, -- own ghost text: time without a key before asking
  settings = {}, -- the language server's, as docs/lsp.md lists them
  keys = {
    accept = '<Tab>',
    accept_word = '<M-w>',
    accept_line = '<M-l>',
    next = '<M-n>',
    previous = '<M-p>',
    dismiss = '<M-e>',
    trigger = '<M-\\>',
  },
}

M.defaults = DEFAULTS
M.config = nil ---@type albor.Config?
M.status = { state = 'stopped', message = '' }
M.enabled = true

local ROOTS = { '.git', 'pyproject.toml', 'package.json', 'Cargo.toml', 'go.mod' }
local group = vim.api.nvim_create_augroup('albor', { clear = true })
local mapped = {} ---@type table<string, table> what our keys did before

---@return table the module that shows ghost text
function M.ghost()
  return require(M.uses_builtin() and 'albor.builtin' or 'albor.ghost')
end

function M.uses_builtin()
  local wish = M.config and M.config.ghost or 'auto'
  return wish ~= 'own' and vim.lsp.inline_completion ~= nil
end

---@return vim.lsp.Client?
function M.client()
  return vim.lsp.get_clients({ name = 'albor' })[1]
end

--- Send a request, as each version of Neovim wants it.
function M.request(client, method, params, handler, bufnr)
  if vim.fn.has('nvim-0.11') == 1 then
    return client:request(method, params, handler, bufnr)
  end
  return client.request(method, params, handler, bufnr)
end

function M.cancel(client, id)
  if vim.fn.has('nvim-0.11') == 1 then
    return client:cancel_request(id)
  end
  return client.cancel_request(id)
end

--- Run one of the language server's commands; `done` gets its result.
function M.execute(name, arguments, done)
  local client = M.client()
  if not client then
    if done then
      M.say('not running: ' .. M.remedy())
    end
    return
  end
  local params = { command = name, arguments = arguments }
  M.request(client, 'workspace/executeCommand', params, function(err, result)
    if done then
      done(err and err.message or result)
    end
  end, 0)
end

function M.say(text, level)
  vim.notify('albor: ' .. text, level or vim.log.levels.INFO)
end

--- What to do when nothing runs.
function M.remedy()
  if vim.fn.executable(M.config.cmd[1]) == 0 then
    return ('%s is not on the PATH: install albor, or set cmd'):format(M.config.cmd[1])
  end
  if M.status.message ~= '' then
    return M.status.message
  end
  return ':Albor start starts it in this buffer'
end

---@return boolean, string? whether the buffer gets suggestions, and why not
function M.wants(bufnr)
  local options, config = vim.bo[bufnr], M.config
  if options.buftype ~= '' then
    return false, 'this is no file'
  end
  if options.binary then
    return false, 'this is a binary file'
  end
  local kind = options.filetype
  if kind == '' then
    return false, 'this buffer has no file type'
  end
  if vim.tbl_contains(config.exclude, kind) then
    return false, kind .. ' is in exclude'
  end
  if config.filetypes and not vim.tbl_contains(config.filetypes, kind) then
    return false, kind .. ' is not in filetypes'
  end
  local bytes = vim.api.nvim_buf_get_offset(bufnr, vim.api.nvim_buf_line_count(bufnr))
  if bytes > config.max_bytes then
    return false, ('%d bytes are more than max_bytes (%d)'):format(bytes, config.max_bytes)
  end
  return true
end

local function capabilities()
  local all = vim.lsp.protocol.make_client_capabilities()
  -- Static: the language server then says at once that it can.
  all.textDocument.inlineCompletion = { dynamicRegistration = false }
  return all
end

--- Start the language server for a buffer, or join the one that runs; quiet where it can't be.
---@return boolean
function M.attach(bufnr)
  if not M.wants(bufnr) or vim.fn.executable(M.config.cmd[1]) == 0 then
    return false
  end
  local name = vim.api.nvim_buf_get_name(bufnr)
  local root = name ~= '' and vim.fs.root(bufnr, ROOTS) or nil
  local id = vim.lsp.start({
    name = 'albor',
    cmd = M.config.cmd,
    root_dir = root,
    init_options = M.config.settings,
    settings = { albor = M.config.settings },
    capabilities = capabilities(),
    -- Each change goes out at once: the language server works ahead of the question.
    flags = { debounce_text_changes = 0, exit_timeout = 500 },
    handlers = {
      ['albor/status'] = function(_, status)
        M.status = status
        vim.api.nvim_exec_autocmds('User', { pattern = 'AlborStatus', modeline = false })
      end,
    },
    on_exit = function(code)
      if code ~= 0 and vim.v.exiting == vim.NIL then
        local message = ('albor-lsp ended with code %d: see :Albor log'):format(code)
        M.status = { state = 'stopped', message = message }
      else
        M.status = { state = 'stopped', message = '' }
      end
    end,
  }, {
    bufnr = bufnr,
    -- One server for all folders: the model is loaded once.
    reuse_client = function(client)
      return client.name == 'albor' and not client:is_stopped()
    end,
    silent = true,
  })
  return id ~= nil
end

local function schedule_attach(bufnr)
  vim.schedule(function()
    if vim.api.nvim_buf_is_loaded(bufnr) and M.enabled then
      M.attach(bufnr)
    end
  end)
end

-- --- keys ---

--- What the key did before, or the key itself.
local function fall_back(before, key)
  if before.callback and before.expr == 1 then
    return before.callback() or ''
  end
  if before.callback then
    vim.schedule(before.callback)
    return ''
  end
  if not before.rhs or before.rhs == '' then
    return key
  end
  local keys = before.expr == 1 and vim.api.nvim_eval(before.rhs) or before.rhs
  if before.noremap == 1 then
    return keys
  end
  vim.api.nvim_feedkeys(vim.api.nvim_replace_termcodes(keys, true, true, true), 'mi', false)
  return ''
end

local function map(key, name)
  local before = vim.fn.maparg(key, 'i', false, true)
  mapped[key] = before
  local run = ("<Cmd>lua require('albor').actions.%s()<CR>"):format(name)
  vim.keymap.set('i', key, function()
    if name == 'trigger' or M.ghost().is_visible() then
      return run
    end
    return fall_back(before, key)
  end, { expr = true, silent = true, desc = 'albor: ' .. name:gsub('_', ' ') })
end

local function unmap_all()
  for key, before in pairs(mapped) do
    pcall(vim.keymap.del, 'i', key)
    if not vim.tbl_isempty(before) then
      vim.fn.mapset('i', false, before)
    end
  end
  mapped = {}
end

M.actions = {
  accept = function() M.ghost().accept('all') end,
  accept_word = function() M.ghost().accept('word') end,
  accept_line = function() M.ghost().accept('line') end,
  next = function() M.ghost().cycle(1) end,
  previous = function() M.ghost().cycle(-1) end,
  dismiss = function() M.ghost().dismiss() end,
  trigger = function() M.ghost().trigger() end,
}

-- --- commands ---

local function show(title, text)
  local bufnr = vim.api.nvim_create_buf(false, true)
  vim.api.nvim_buf_set_lines(bufnr, 0, -1, false, vim.split(tostring(text), '\n'))
  vim.bo[bufnr].bufhidden = 'wipe'
  vim.bo[bufnr].modifiable = false
  pcall(vim.api.nvim_buf_set_name, bufnr, 'albor://' .. title)
  vim.cmd.sbuffer(bufnr)
  vim.bo[bufnr].filetype = 'markdown'
end

local function ask_and_show(command, title)
  return function()
    M.execute(command, nil, function(text)
      show(title, text or '')
    end)
  end
end

local COMMANDS = {
  status = function()
    M.say(M.summary())
  end,
  start = function()
    M.enabled = true
    local wanted, why = M.wants(0)
    if not wanted then
      return M.say('no suggestions here: ' .. why, vim.log.levels.WARN)
    end
    if not M.attach(vim.api.nvim_get_current_buf()) then
      M.say(M.remedy(), vim.log.levels.WARN)
    end
  end,
  stop = function()
    M.enabled = false
    for _, client in ipairs(vim.lsp.get_clients({ name = 'albor' })) do
      vim.lsp.stop_client(client.id)
    end
  end,
  toggle = function()
    M.execute('albor.pause', nil, function(is_paused)
      M.ghost().dismiss()
      M.say(is_paused == true and 'paused' or 'suggesting')
    end)
  end,
  explain = ask_and_show('albor.explain', 'explain'),
  stats = ask_and_show('albor.stats', 'stats'),
  log = ask_and_show('albor.showLog', 'log'),
}

---@return string one line about how albor is
function M.summary()
  local client = M.client()
  if not client then
    return 'not running: ' .. M.remedy()
  end
  local status = M.status
  local parts = { status.state }
  for _, each in ipairs({ 'model', 'server', 'message' }) do
    if status[each] and status[each] ~= '' then
      parts[#parts + 1] = status[each]
    end
  end
  local shown = type(status.latency) == 'table' and status.latency.shown_ms
  if shown then
    parts[#parts + 1] = ('last suggestion after %.0f ms'):format(shown)
  end
  local wanted, why = M.wants(0)
  if not wanted then
    parts[#parts + 1] = 'no suggestions here: ' .. why
  end
  return table.concat(parts, ' | ')
end

---@return string[] names of the subcommands
function M.names()
  local names = vim.tbl_keys(COMMANDS)
  table.sort(names)
  return names
end

---@param arguments string what stands after :Albor; nothing means status
function M.command(arguments)
  local name = vim.trim(arguments)
  local run = COMMANDS[name == '' and 'status' or name]
  if not run then
    local message = ('no command %q: one of %s'):format(name, table.concat(M.names(), ', '))
    return M.say(message, vim.log.levels.ERROR)
  end
  run()
end

-- --- setup ---

--- Take the person's settings and begin. A second call replaces the first one's.
---@param config albor.Config?
function M.setup(config)
  if vim.fn.has('nvim-0.10') == 0 then
    return M.say('Neovim 0.10 or newer is needed', vim.log.levels.ERROR)
  end
  config = config or {}
  for name in pairs(config) do
    if DEFAULTS[name] == nil and name ~= 'filetypes' then
      M.say(('unknown setting %q: see :help albor-settings'):format(name), vim.log.levels.WARN)
    end
  end
  if config.keys == false then
    config = vim.tbl_extend('force', config, { keys = {} })
    for name in pairs(DEFAULTS.keys) do
      config.keys[name] = false
    end
  end
  M.config = vim.tbl_deep_extend('force', DEFAULTS, config)
  unmap_all()
  for name, key in pairs(M.config.keys) do
    if key and M.actions[name] then
      map(key, name)
    end
  end
  vim.api.nvim_clear_autocmds({ group = group })
  vim.api.nvim_create_autocmd('FileType', {
    group = group,
    callback = function(event)
      schedule_attach(event.buf)
    end,
  })
  for name, method in pairs({ LspAttach = 'attach', LspDetach = 'detach' }) do
    vim.api.nvim_create_autocmd(name, {
      group = group,
      callback = function(event)
        local client = vim.lsp.get_client_by_id(event.data.client_id)
        if client and client.name == 'albor' then
          M.ghost()[method](client, event.buf)
        end
      end,
    })
  end
  for _, bufnr in ipairs(vim.api.nvim_list_bufs()) do
    schedule_attach(bufnr)
  end
end

return M
