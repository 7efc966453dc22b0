-- Reports of one host about levels, and what it is granted: `Level::report` of level.rs says the same in Rust, and a test
-- holds the two together. All keys of a call have one hash tag where the store is a cluster, so that it runs on one node.
--
-- KEYS: the mark of this part of the store, then the levels.
-- ARGV: lease (µs), how long a silent host's record is kept (µs), then for each level: host, kind (b, s, p, c), amount,
-- window (µs; of p: the period's end, unix ms), its length (ms), time to live of the key beyond its window (ms; 0: for
-- ever), sequence number, spent, where counting begins in a level that is new to the host, the same where only the record is gone, the
-- level's birth as the host knows it, kept, wanted, needed, held, hard (1 or 0).
-- Answer: the mark, then for each level: accepted (1 or 0), out, free, used, hosts, reset (µs), settled (µs), birth; or a text: what
-- is wrong with the level.
--
-- The mark is when this part of the store began (µs): another one says that its data was lost.
-- A level is a hash: b its birth (µs), u units used, t when that was so (µs), s:N units used in the N-th sixteenth of a window,
-- p the period's end, o units of it that were overuse, h:HOST "sequence spent out expiry held".

local SLOTS = 16
local FIELDS = 16
-- The longest lease that can be configured, µs: what ends later was granted by a clock that has been set back since.
local LEASE_LONGEST = 61000000
-- A clock that was set back by less is no reason to end a period early, ms.
local SET_BACK = 60000
-- Windows that a debt is kept for where nobody reports.
local DEBT_WINDOWS = 32
-- Records that one call removes: Lua hands over some thousand arguments at most.
local GONE_MOST = 1000
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease_us, keep_us = tonumber(ARGV[1]), tonumber(ARGV[2])

-- Numbers are doubles, exact to 2^53; tostring would round them to 14 digits.
local function whole(n) return string.format('%.0f', n) end
local function exact(n) return string.format('%.17g', n) end
-- An answer is a 64-bit integer.
local function answer(n) return math.min(math.floor(n), 4611686018427387904) end

local function report(key, at)
  local host, kind = ARGV[at], ARGV[at + 1]
  local amount, window, length_ms = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local ttl_ms, seq, spent = tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6]), tonumber(ARGV[at + 7])
  local from_start, from_known = tonumber(ARGV[at + 8]), tonumber(ARGV[at + 9])
  local birth_known = tonumber(ARGV[at + 10])
  local kept, wanted, needed = tonumber(ARGV[at + 11]), tonumber(ARGV[at + 12]), tonumber(ARGV[at + 13])
  local held, hard = tonumber(ARGV[at + 14]), ARGV[at + 15] == '1'

  local raw = redis.call('HGETALL', key)
  local used, seen, ends, birth = 0, now, 0, now
  local over, noted = 0, 0
  local slots, me, hosts, others, gone, mended = {}, nil, 1, 0, {}, {}
  local slot = math.floor(now * SLOTS / math.max(window, 1))
  for i = 1, #raw, 2 do
    local field, value = raw[i], raw[i + 1]
    local sort = string.sub(field, 1, 1)
    if sort == 'u' then used = tonumber(value)
    elseif sort == 't' then seen = tonumber(value)
    elseif sort == 'b' then birth = tonumber(value)
    elseif sort == 'p' then ends = tonumber(value)
    elseif sort == 'o' then
      noted = tonumber(value)
      over = noted
    elseif sort == 's' then
      local n = tonumber(string.sub(field, 3))
      -- Of a clock that has been set back since: it counts from now.
      if n > slot then
        gone[#gone + 1] = field
        n = slot
      end
      slots[n] = (slots[n] or 0) + tonumber(value)
    else
      local s, c, o, e, d = string.match(value, '^(%S+) (%S+) (%S+) (%S+) ?(%S*)$')
      e = tonumber(e)
      -- Hosts of before 2026-11-21 did not tell what they hold.
      if d == '' then d = '0' end
      if field == 'h:' .. host then
        me = { seq = tonumber(s), spent = tonumber(c), out = e > now and tonumber(o) or 0 }
      else
        if e > now + LEASE_LONGEST then
          e = now + lease_us
          mended[field] = table.concat({ s, c, o, whole(e), d }, ' ')
        end
        if e > now then hosts, others = hosts + 1, others + tonumber(o) end
        -- What a bucket's host held when it fell silent may come back until time has given all of it back.
        if e + window > now then held = held + tonumber(d) end
        if e + keep_us < now then gone[#gone + 1] = field end
      end
    end
  end

  -- A message from before the last one changes nothing; the host does not look at the answer.
  if me and seq < me.seq then return { 0, 0, 0, 0, hosts, 0, 0, birth } end

  for field, value in pairs(mended) do redis.call('HSET', key, field, value) end

  -- What time has given back. A clock that went back gives nothing.
  if kind == 'b' then
    used = math.max(0, used - math.max(0, now - seen) * amount / window)
  elseif kind == 's' then
    used = 0
    for n, units in pairs(slots) do
      if n < slot - SLOTS then gone[#gone + 1] = 's:' .. whole(n) else used = used + units end
    end
  end

  -- A new period begins when the old one has ended by this clock, whatever a host's clock says. Debt goes along:
  -- what is above the amount and was no overuse was used under a greater one.
  local now_ms = now / 1000
  if kind == 'p' and window > ends and ends <= now_ms + 1000 then
    if ends > 0 then
      used = math.min(math.max(0, used - amount), over)
      -- The part that this period cannot pay is overuse of this one too.
      over = math.max(0, used - amount)
    end
    ends = window
    redis.call('HSET', key, 'p', whole(ends))
  elseif kind == 'p' and ends > window and window > now_ms + SET_BACK then
    -- Begun by a clock that was ahead: otherwise none would begin until then. What was used counts on.
    ends = window
    redis.call('HSET', key, 'p', whole(ends))
  end

  local before = from_start
  if me then before = me.spent elseif birth == birth_known then before = math.max(from_start, from_known) end
  local more = spent - before
  used = math.max(0, used + more)
  if kind == 'p' and hard then
    -- Overuse is noted when it is reported: what the host's lease does not cover, where all that is used and leased is
    -- above the amount. What was leased before the amount was lowered is none.
    local uncovered = more + kept - (me and me.out or 0)
    over = over + math.max(0, math.min(uncovered, used + others + kept - amount))
  end
  if kind == 's' then
    if more ~= 0 then slots[slot] = math.max(0, (slots[slot] or 0) + more) end
    if slots[slot] then redis.call('HSET', key, 's:' .. whole(slot), exact(slots[slot])) end
  end

  local free = math.floor(amount - used - others - kept)
  local extra = 0
  if free > 0 and wanted > 0 then
    extra = math.min(wanted, math.max(math.floor(free / (2 * hosts)), math.min(needed, free)))
  end
  local out = kept + extra

  redis.call('HSET', key, 'b', whole(birth), 'u', exact(used), 't', whole(now), 'h:' .. host,
    table.concat({ whole(seq), whole(spent), whole(out), whole(now + lease_us), ARGV[at + 14] }, ' '))
  if over ~= noted then redis.call('HSET', key, 'o', exact(over)) end
  if #gone > 0 then redis.call('HDEL', key, unpack(gone, 1, math.min(#gone, GONE_MOST))) end
  if ttl_ms == 0 then
    redis.call('PERSIST', key)
  else
    local debt_ms = length_ms * math.min(DEBT_WINDOWS, math.floor(used / math.max(amount, 1)))
    redis.call('PEXPIRE', key, whole(ttl_ms + debt_ms + math.max(0, ends - now_ms)))
  end

  local reset, settled = 0, 0
  if kind == 'b' then
    reset = used * window / math.max(amount, 1)
    settled = math.max(0, used - held) * window / math.max(amount, 1)
  elseif kind == 's' then
    reset = used > 0 and window or 0
  end
  return { 1, answer(out), answer(math.max(0, free - extra)), answer(used), hosts, answer(reset), answer(settled), birth }
end

local mark = redis.call('GET', KEYS[1])
if not mark then
  mark = whole(now)
  redis.call('SET', KEYS[1], mark)
end
local answers = { tonumber(mark) }
for i = 2, #KEYS do
  -- One level that cannot be read does not keep the others from being counted.
  local fine, said = pcall(report, KEYS[i], 3 + (i - 2) * FIELDS)
  if not fine then said = type(said) == 'table' and said.err or tostring(said) end
  answers[i] = said
end
return answers
