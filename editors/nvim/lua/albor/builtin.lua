-- Ghost text through vim.lsp.inline_completion, which Neovim has from 0.12 on.

local text = require('albor.text')

local M = {}
local NAMESPACE = 'nvim.lsp.inline_completion'

function M.attach(_, bufnr)
  vim.lsp.inline_completion.enable(true, { bufnr = bufnr })
end

function M.detach(_, bufnr)
  if vim.api.nvim_buf_is_loaded(bufnr) then
    vim.api.nvim_buf_clear_namespace(bufnr, vim.api.nvim_create_namespace(NAMESPACE), 0, -1)
  end
end

function M.is_visible()
  local id = vim.api.nvim_create_namespace(NAMESPACE)
  return #vim.api.nvim_buf_get_extmarks(0, id, 0, -1, { limit = 1 }) > 0
end

---@param kind 'all'|'word'|'line'
function M.accept(kind)
  vim.lsp.inline_completion.get({
    on_accept = function(item)
      if type(item.insert_text) ~= 'string' then
        return item
      end
      -- What was typed since the answer came stands in the buffer already: Neovim replaces only
      -- the range that the answer named.
      local row, column = unpack(vim.api.nvim_win_get_cursor(0))
      local start_row, start_column = row - 1, column
      if item.range then
        start_row, start_column = item.range:to_extmark()
      end
      if start_row ~= row - 1 or start_column > column then
        return nil
      end
      local typed = vim.api.nvim_buf_get_text(0, start_row, start_column, row - 1, column, {})[1]
      if item.insert_text:sub(1, #typed) ~= typed then
        return nil
      end
      local rest = item.insert_text:sub(#typed + 1)
      local piece = text.piece(rest, kind)
      text.break_undo()
      local end_column = column
      if item.range then
        local _, _, _, last = item.range:to_extmark()
        -- The end of the range moved with the text typed before it.
        local length = last - start_column
        if piece == rest and length > 0 then
          end_column = math.max(column, math.min(start_column + #typed + length,
            #vim.api.nvim_get_current_line()))
        end
      end
      require('albor.insert').replace(column, end_column, piece)
      if piece == rest and item.command then
        require('albor').execute(item.command.command, item.command.arguments)
      end
      text.break_undo()
      return nil
    end,
  })
end

function M.cycle(count)
  vim.lsp.inline_completion.select({ count = count })
end

function M.dismiss()
  -- There is no call for it: off and on again forgets the suggestion.
  vim.lsp.inline_completion.enable(false, { bufnr = 0 })
  vim.lsp.inline_completion.enable(true, { bufnr = 0 })
end

function M.trigger()
  vim.api.nvim_exec_autocmds('CursorMovedI', { buffer = 0, modeline = false })
end

return M
