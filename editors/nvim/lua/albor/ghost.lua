-- Ghost text of our own, on extmarks: for Neovim 0.10 and 0.11, and wherever it is chosen.
-- It asks without waiting and shows the rest of a suggestion while typing agrees with it.

local albor = require('albor')
local insert = require('albor.insert')
local text = require('albor.text')

local M = {}
local NAMESPACE = vim.api.nvim_create_namespace('albor.inline_completion')
local INVOKED, AUTOMATIC = 1, 2

---@class albor.Shown
---@field items table[] the answer's
---@field index integer which of them
---@field row integer line of the suggestion's start, from 0
---@field column integer byte column of its start
---@field text string all of it, from there
---@field tail integer bytes of the line behind what it replaces

local shown = {} ---@type table<integer, albor.Shown>
local asked = {} ---@type table<integer, table> the question that is under way
local seen = {} ---@type table<integer, string> the last event that was looked at
local timers = {} ---@type table<integer, uv.uv_timer_t>

local function clear(bufnr)
  shown[bufnr] = nil
  if vim.api.nvim_buf_is_loaded(bufnr) then
    vim.api.nvim_buf_clear_namespace(bufnr, NAMESPACE, 0, -1)
  end
end

local function stop_asking(bufnr)
  local timer = timers[bufnr]
  if timer then
    timers[bufnr] = nil
    timer:stop()
    timer:close()
  end
  local question = asked[bufnr]
  asked[bufnr] = nil
  if question and question.id then
    local client = vim.lsp.get_client_by_id(question.client_id)
    if client then
      pcall(albor.cancel, client, question.id)
    end
  end
end

--- What is left of a suggestion behind the cursor; nil where typing went another way.
local function rest_of(suggestion)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  if row - 1 ~= suggestion.row or column < suggestion.column then
    return nil
  end
  local typed = line:sub(suggestion.column + 1, column)
  if suggestion.text:sub(1, #typed) ~= typed then
    return nil
  end
  if #line - column < suggestion.tail then
    return nil
  end
  local rest = suggestion.text:sub(#typed + 1)
  return rest ~= '' and rest or nil
end

--- Draw what is left, or take it away.
---@return boolean whether something is shown
local function draw(bufnr)
  local suggestion = shown[bufnr]
  if not suggestion then
    return false
  end
  local rest = rest_of(suggestion)
  if not rest then
    clear(bufnr)
    return false
  end
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  local replaced = line:sub(column + 1, #line - suggestion.tail)
  -- Text that stands behind the cursor and ends the suggestion too is not drawn twice.
  if replaced ~= '' and vim.endswith(rest, replaced) then
    rest = rest:sub(1, #rest - #replaced)
  end
  local lines = vim.split(rest, '\n', { plain = true })
  local below = {}
  for index = 2, #lines do
    below[#below + 1] = { { lines[index] == '' and ' ' or lines[index], 'AlborGhost' } }
  end
  vim.api.nvim_buf_clear_namespace(bufnr, NAMESPACE, 0, -1)
  vim.api.nvim_buf_set_extmark(bufnr, NAMESPACE, row - 1, column, {
    virt_text = { { lines[1], 'AlborGhost' } },
    virt_text_pos = 'inline',
    virt_lines = #below > 0 and below or nil,
    hl_mode = 'combine',
  })
  return true
end

--- Byte column of a position that the language server named.
local function byte_in(line, character, encoding)
  if encoding == 'utf-8' then
    return math.min(character, #line)
  end
  if vim.fn.has('nvim-0.11') == 1 then
    return vim.str_byteindex(line, encoding, character, false)
  end
  local fits, byte = pcall(vim.str_byteindex, line, character, encoding == 'utf-16')
  return fits and byte or #line
end

local function take(bufnr, items, index)
  local item = items[index]
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local line = vim.api.nvim_get_current_line()
  local content = item.insertText
  local suggestion = {
    items = items,
    index = index,
    row = row - 1,
    column = item.first or column,
    tail = item.tail or (#line - column),
    text = type(content) == 'table' and content.value or content,
    command = item.command,
  }
  shown[bufnr] = suggestion
  return draw(bufnr)
end

--- Ask the language server; what comes is shown if it still fits.
local function ask(bufnr, kind, on_items)
  local client = vim.lsp.get_clients({ name = 'albor', bufnr = bufnr })[1]
  if not client or vim.api.nvim_get_current_buf() ~= bufnr then
    return
  end
  stop_asking(bufnr)
  local params = vim.lsp.util.make_position_params(0, client.offset_encoding)
  params.context = { triggerKind = kind }
  local line = vim.api.nvim_get_current_line()
  local question = { client_id = client.id }
  asked[bufnr] = question
  local sent, id = albor.request(client, 'textDocument/inlineCompletion', params,
    function(err, result)
      if asked[bufnr] ~= question then
        return
      end
      asked[bufnr] = nil
      local here = vim.api.nvim_get_current_buf() == bufnr
      if not here or vim.api.nvim_get_mode().mode:sub(1, 1) ~= 'i' then
        return
      end
      local items = not err and result and (result.items or result) or {}
      for _, item in ipairs(items) do
        -- Counted in the line that was asked about: it may have grown since.
        if item.range then
          local first, last = item.range.start.character, item.range['end'].character
          item.first = byte_in(line, first, client.offset_encoding)
          item.tail = #line - byte_in(line, last, client.offset_encoding)
        end
      end
      if #items == 0 then
        if not err then
          clear(bufnr)
        end
        return
      end
      if on_items then
        on_items(items)
      else
        take(bufnr, items, 1)
      end
    end, bufnr)
  if sent then
    question.id = id
  else
    asked[bufnr] = nil
  end
end

local function changed(bufnr)
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local now = ('%d %d %d'):format(vim.api.nvim_buf_get_changedtick(bufnr), row, column)
  if seen[bufnr] == now then
    return -- one key comes as several events
  end
  seen[bufnr] = now
  draw(bufnr)
  stop_asking(bufnr)
  local wait = albor.config.debounce_ms
  if wait <= 0 then
    ask(bufnr, AUTOMATIC)
    return
  end
  timers[bufnr] = vim.defer_fn(function()
    timers[bufnr] = nil
    if vim.api.nvim_get_mode().mode:sub(1, 1) == 'i' then
      ask(bufnr, AUTOMATIC)
    end
  end, wait)
end

local function group_of(bufnr)
  return 'albor.ghost.' .. bufnr
end

function M.attach(_, bufnr)
  vim.api.nvim_set_hl(0, 'AlborGhost', { link = 'NonText', default = true })
  local group = vim.api.nvim_create_augroup(group_of(bufnr), { clear = true })
  vim.api.nvim_create_autocmd({ 'InsertEnter', 'CursorMovedI', 'TextChangedI', 'TextChangedP' }, {
    group = group,
    buffer = bufnr,
    callback = function(event)
      if event.event == 'InsertEnter' then
        -- The cursor has its place in insert mode only after this event.
        seen[bufnr] = nil
        vim.schedule(function()
          if vim.api.nvim_get_current_buf() == bufnr and vim.fn.mode():sub(1, 1) == 'i' then
            changed(bufnr)
          end
        end)
        return
      end
      changed(bufnr)
    end,
  })
  vim.api.nvim_create_autocmd({ 'InsertLeave', 'BufLeave' }, {
    group = group,
    buffer = bufnr,
    callback = function()
      stop_asking(bufnr)
      clear(bufnr)
    end,
  })
  if vim.api.nvim_get_current_buf() == bufnr and vim.fn.mode():sub(1, 1) == 'i' then
    changed(bufnr)
  end
end

function M.detach(_, bufnr)
  stop_asking(bufnr)
  clear(bufnr)
  seen[bufnr] = nil
  pcall(vim.api.nvim_del_augroup_by_name, group_of(bufnr))
end

function M.is_visible()
  return #vim.api.nvim_buf_get_extmarks(0, NAMESPACE, 0, -1, { limit = 1 }) > 0
end

---@param kind 'all'|'word'|'line'
function M.accept(kind)
  local bufnr = vim.api.nvim_get_current_buf()
  local suggestion = shown[bufnr]
  local rest = suggestion and rest_of(suggestion)
  if not rest then
    return
  end
  stop_asking(bufnr)
  local piece = text.piece(rest, kind)
  local is_all = piece == rest
  local column = vim.api.nvim_win_get_cursor(0)[2]
  local last = column
  if is_all then
    last = #vim.api.nvim_get_current_line() - suggestion.tail
  end
  clear(bufnr)
  text.break_undo()
  insert.replace(column, last, piece)
  text.break_undo()
  if is_all then
    if suggestion.command then
      albor.execute(suggestion.command.command, suggestion.command.arguments)
    end
    return
  end
  local row, behind = unpack(vim.api.nvim_win_get_cursor(0))
  suggestion.row, suggestion.column = row - 1, behind
  suggestion.text = rest:sub(#piece + 1)
  shown[bufnr] = suggestion
  draw(bufnr)
end

--- Show another suggestion; asks for more where there is one only.
function M.cycle(count)
  local bufnr = vim.api.nvim_get_current_buf()
  local suggestion = shown[bufnr]
  if not suggestion then
    return
  end
  if #suggestion.items > 1 then
    local index = (suggestion.index - 1 + count) % #suggestion.items + 1
    take(bufnr, suggestion.items, index)
    return
  end
  ask(bufnr, INVOKED, function(items)
    take(bufnr, items, count % #items + 1)
  end)
end

function M.dismiss()
  local bufnr = vim.api.nvim_get_current_buf()
  stop_asking(bufnr)
  clear(bufnr)
end

function M.trigger()
  ask(vim.api.nvim_get_current_buf(), INVOKED)
end

return M
