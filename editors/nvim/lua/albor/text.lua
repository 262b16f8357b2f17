-- Pieces of a suggestion: its next word, its next line.

local M = {}

--- The part of `text` that accepting a word takes: blanks, then letters or signs.
---@param text string
---@return string
function M.word(text)
  -- Bytes from 128 belong to letters outside ASCII; a character is never cut.
  return text:match('^%s*[%w_\128-\255]+') or text:match('^%s*[^%w_%s\128-\255]+') or text
end

--- The part of `text` up to its next line break; a break at the start is taken along.
---@param text string
---@return string
function M.line(text)
  return text:match('^\n?[^\n]*')
end

---@param text string
---@param kind 'all'|'word'|'line'
---@return string
function M.piece(text, kind)
  if kind == 'word' then
    return M.word(text)
  end
  return kind == 'line' and M.line(text) or text
end

--- End the undo step, so that what follows is undone by itself.
function M.break_undo()
  vim.o.undolevels = vim.o.undolevels
end

return M
