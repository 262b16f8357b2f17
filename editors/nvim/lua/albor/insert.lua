-- Put text in at the cursor.

local M = {}

--- Replace part of the cursor's line and put the cursor behind the new text.
---@param first integer byte column, from 0
---@param last integer byte column behind the end
---@param text string may hold line breaks
function M.replace(first, last, text)
  local row = vim.api.nvim_win_get_cursor(0)[1]
  local lines = vim.split(text, '\n', { plain = true })
  vim.api.nvim_buf_set_text(0, row - 1, first, row - 1, last, lines)
  local column = #lines[#lines] + (#lines == 1 and first or 0)
  vim.api.nvim_win_set_cursor(0, { row + #lines - 1, column })
end

return M
